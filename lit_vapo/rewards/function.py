"""A Python function as a source of rewards, in the shape that TRL's reward functions have."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from lit_vapo.models.policy import Policy
from lit_vapo.models.settings import shortened
from lit_vapo.ranges import PositiveInt, check_ranges
from lit_vapo.rewards.normalised import NormalisedSource
from lit_vapo.rewards.source import Responses
from lit_vapo.types import Message, Prompt

# What a function is given besides the columns of the prompts' file; these win over columns of the same names.
GIVEN = ("prompts", "completions", "completion_ids")
LARGEST = torch.finfo(torch.float32).max
# What TRL gives, too, and nothing here could.
TRAINERS = ("trainer_state", "log_extra", "log_metric", "environments")


class FunctionReward(NormalisedSource):
    """Rewards from a Python function.

    It is called once for a batch of B responses, with keywords, and gets those that its signature takes:

    - `prompts` and `completions`: texts where prompts are texts. Where they are messages, lists of messages: a
      completion is a list of one assistant's message, `[{"role": "assistant", "content": …}]`. A prompt that ends
      within the assistant's message is given without it, and the completion with all of it.
    - `completion_ids`: the tokens of each response, by the policy's tokenizer;
    - each further column of the prompts' file, a list of B values.

    It returns B numbers, or B lists of K numbers, one for each member: a list, a tensor or an array. `None` in place of
    a response's numbers says that the function does not apply to it: a sum then takes nothing from it (mean 0 and
    variance 0), and alone it is an error. An `async` function is run to its end, in an event loop of its own, before
    PPO goes on.

    Departures from TRL: there is no `trainer_state` and no function for logging, since a reward depends on the response
    alone; K numbers are allowed; a completion is the text without control tokens in either form.

    Args:
        function: Import path, as `my_rewards.length` or `my_rewards:length`; the working directory is looked through.
        num_members: Numbers K that the function returns for each response. With K of 1 nothing is known of a variance.
        normalise: Centre and scale members on responses of the reference policy, which gives rewards the unit of an
            ensemble's. `null` does so for K of 2 or more, since the variance over members that differ in origin and
            unit means nothing; one number keeps its own unit.

    Raises:
        ValueError: `num_members` is less than 1.
    """

    def __init__(self, function: str, num_members: PositiveInt = 1, normalise: bool | None = None) -> None:
        super().__init__()
        check_ranges(FunctionReward, locals(), "reward.")
        self.function = function
        self._num_members = num_members
        self.normalise = normalise
        self._called: Callable[..., Any] | None = None
        self._takes: frozenset[str] | None = None
        self._needs_ids = False

    @property
    def num_members(self) -> int:
        """Members K."""
        return self._num_members

    def check(self) -> None:
        """Import the function, and see what it takes.

        Raises:
            ValueError: It cannot be imported or called with keywords, or wants what there is not.
        """
        if self._called is not None:
            return
        called = import_function(self.function)
        try:
            parameters = list(inspect.signature(called).parameters.values())
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.name}: expected a function with a signature, got {called!r}") from error
        required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        for parameter in required:
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise ValueError(
                    f"{self.name}: expected a function that takes keywords, got {parameter.name!r} without one"
                )
            if parameter.name in TRAINERS:
                raise ValueError(
                    f"{self.name}: expected parameters among {', '.join(GIVEN)} and the columns of the prompts' file, "
                    f"got {parameter.name!r}, which only TRL gives; a default of None lets it run here"
                )
        self.columns = tuple(p.name for p in required if p.name not in GIVEN)
        self._needs_ids = any(p.name == "completion_ids" for p in required)
        everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._takes = None if everything else frozenset(p.name for p in parameters)
        self._called = called

    def prepare(self, policy: Policy | None) -> None:
        """Import the function."""
        self.check()
        super().prepare(policy)

    @property
    def centred(self) -> bool:
        """As `normalise` says, or else where there are several members."""
        return self.num_members > 1 if self.normalise is None else self.normalise

    def raw(self, responses: Responses) -> tuple[Tensor, Tensor]:
        """What the function returns (B, K), zeros where it does not apply, and where it does (B,).

        Raises:
            ValueError: It raises, or returns something else than finite numbers; the message says for which prompt.
        """
        rows = self._rows(self._call(responses), responses)
        empty = [0.0] * self.num_members
        rewards = torch.tensor([empty if row is None else row for row in rows], dtype=torch.float32)
        applies = torch.tensor([row is not None for row in rows])
        return rewards.to(responses.device), applies.to(responses.device)

    def _call(self, responses: Responses) -> Any:
        """What the function returns for B responses."""
        assert self._called is not None, "`prepare` comes first"
        missing = [name for name in self.columns if name not in responses.columns]
        if missing:
            there = ", ".join(sorted(responses.columns)) or "none"
            raise ValueError(f"{self.name}: expected a column {missing[0]!r} beside the prompts, got {there}")
        dialogues = [conversation(*pair) for pair in zip(responses.prompts, responses.texts, strict=True)]
        given = {
            **{name: list(column) for name, column in responses.columns.items()},
            "prompts": [prompt for prompt, _ in dialogues],
            "completions": [completion for _, completion in dialogues],
        }
        if responses.rows is not None:
            given["completion_ids"] = [sequence.ids[sequence.prompt_length :] for sequence in responses.sequences]
        elif self._needs_ids:
            raise ValueError(f"{self.name}: expected responses with their tokens (completion_ids), got texts alone")
        wanted = {name: value for name, value in given.items() if self._takes is None or name in self._takes}
        try:
            returned = self._called(**wanted)
            if inspect.iscoroutine(returned):
                # In a thread of its own, since this one may have a loop that runs already (a notebook's).
                with ThreadPoolExecutor(1) as pool:
                    returned = pool.submit(asyncio.run, returned).result()
        except Exception as error:
            first = shortened(responses.prompts[0].content)
            raise ValueError(
                f"{self.name}: expected rewards, got {type(error).__name__}: {error} (in a batch of {len(responses)} "
                f"responses, the first to prompt {first})"
            ) from error
        return returned

    def _rows(self, returned: Any, responses: Responses) -> list[list[float] | None]:
        """What was returned as K numbers or None for each response.

        Raises:
            ValueError: It is anything else.
        """
        returned = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(returned, Sequence) or isinstance(returned, (str, bytes)):
            raise ValueError(f"{self.name}: expected a list of {len(responses)} rewards, got {shortened(returned)}")
        if len(returned) != len(responses):
            raise ValueError(
                f"{self.name}: expected {len(responses)} rewards, one for each response, got {len(returned)} "
                f"(the first prompt is {shortened(responses.prompts[0].content)})"
            )
        pairs = zip(returned, responses.prompts, strict=True)
        return [None if row is None else self._numbers(row, prompt) for row, prompt in pairs]

    def _numbers(self, row: Any, prompt: Prompt) -> list[float]:
        row = row.tolist() if hasattr(row, "tolist") else row
        values = list(row) if isinstance(row, Sequence) and not isinstance(row, (str, bytes)) else [row]
        values = [value.item() if hasattr(value, "item") else value for value in values]
        where = f"for prompt {shortened(prompt.content)}"
        if len(values) != self.num_members:
            raise ValueError(
                f"{self.name}: expected {self.num_members} numbers a response (num_members), got {len(values)} {where}"
            )
        for value in values:
            # Rewards are float32: what is larger than that holds would become infinite.
            if not isinstance(value, Real) or not -LARGEST <= cast("float", value) <= LARGEST:
                raise ValueError(f"{self.name}: expected finite numbers or None, got {shortened(value)} {where}")
        return [float(value) for value in values]

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"reward function {self.function}"


def import_function(path: str) -> Callable[..., Any]:
    """Import a function by `module.name` or `module:name`.

    Raises:
        ValueError: There is no such module or name, the module raises, or it is no function.
    """
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    expected = f"reward function: expected a function that can be imported, as my_rewards.length, got {path!r}"
    if not module or not name:
        raise ValueError(expected)
    try:
        found: Any = reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception as error:
        # Whatever a module of the user's raises while it is imported.
        raise ValueError(f"{expected} ({type(error).__name__}: {error})") from error
    if not callable(found):
        raise ValueError(f"{expected}, which is a {type(found).__name__}")
    return found


def conversation(prompt: Prompt, response: str) -> tuple[str | list[Message], str | list[Message]]:
    """A prompt and a response as TRL's reward functions get them.

    Examples:
        >>> conversation(Prompt("2 + 2 ="), " 4")
        ('2 + 2 =', ' 4')
        >>> conversation(Prompt([{"role": "user", "content": "2 + 2?"}]), "4")
        ([{'role': 'user', 'content': '2 + 2?'}], [{'role': 'assistant', 'content': '4'}])
    """
    if isinstance(prompt.content, str):
        return prompt.content, response
    # Copies: a function that changes what it is given must not change the data.
    messages = [dict(message) for message in prompt.content]
    begun = messages.pop().get("content") if messages[-1]["role"] == "assistant" else ""
    return messages, [{"role": "assistant", "content": f"{begun or ''}{response}"}]
