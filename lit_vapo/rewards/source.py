"""The one door for rewards: what is asked of a source of rewards, and what it is offered.

Nobody outside of this folder knows where a reward is computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_vapo.models.critic import HiddenStates
from lit_vapo.models.policy import Policy
from lit_vapo.models.token_rows import TokenRows
from lit_vapo.models.trunk import Tap
from lit_vapo.types import Prompt, RewardEstimate, TokenSequence


class Scorer(NamedTuple):
    """A model that scoring runs besides the policy's own.

    Attributes:
        model: What is held for it.
        run: A pass through it, of right-padded token ids (B, L), lengths (B,) and lengths of prompts (B,).
    """

    model: nn.Module
    run: Callable[[Tensor, Tensor, Tensor], Any]


class Encode(Protocol):
    """Writes B responses as another tokenizer and its chat template have them."""

    def __call__(self, tokenizer: PreTrainedTokenizerBase, path: str, *, closed: bool = False) -> list[TokenSequence]:
        """Prompts and responses in the tokens of `tokenizer`.

        Args:
            tokenizer: The tokenizer.
            path: The model it belongs to, whose stop tokens end a response.
            closed: Write each as a conversation that is over, cut off or not: up to all that the template writes after
                the answer, or with what ends a text. Otherwise up to the first stop token, if the response ended.
        """


@dataclass(kw_only=True)
class Responses:
    """B responses to score, in every form that a source may want; it takes what it can use.

    Attributes:
        prompts: What each response answers, as a text or as messages.
        texts: What each says, without control tokens.
        finished: Whether it ended by itself (B,) bool.
        encode: The responses as another tokenizer and its chat template have them.
        rows: Prompts and responses in the tokens of `tokenizer`, which are the policy's; `None` where nobody knows its
            tokens, but the texts alone.
        tokenizer: The policy's tokenizer.
        vocabulary_size: Tokens that the policy has embeddings for, V.
        columns: Further columns of the prompts' file by name, B values each.
        pooled: Pooled hidden states (B, H) from the reference's own pass, for each tap that the source has asked for.
    """

    prompts: list[Prompt]
    texts: list[str]
    finished: Tensor
    encode: Encode
    rows: TokenRows | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    vocabulary_size: int = 0
    columns: Mapping[str, list[Any]] = field(default_factory=dict)
    pooled: Mapping[Tap, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of responses B."""
        return len(self.texts)

    @property
    def device(self) -> torch.device:
        """Where estimates are expected."""
        return self.finished.device

    @property
    def sequences(self) -> list[TokenSequence]:
        """Prompts and responses in the policy's tokens."""
        assert self.rows is not None, "responses came as texts alone"
        return self.rows.sequences


class RewardSource(nn.Module, ABC):
    """Scores responses. PPO, rollouts and studies know this and nothing else of rewards.

    A subclass gives `num_members` and `score`. It keeps every constructor argument as an attribute of the same name, so
    that a checkpoint can name it. Making one runs no code of others, since exports make one from what a checkpoint
    says. What takes memory is loaded in `prepare`, with all that a state dict has: until then a source costs nothing
    and can be asked whether it fits.

    Attributes:
        columns: Columns of the prompts' file that `score` needs besides the prompt; known after `check`.
        separate_members: Whether estimates have discrete members, for objectives that look at each.
    """

    columns: tuple[str, ...] = ()
    separate_members: bool = True

    # 1. Before anything is loaded.

    @property
    def named(self) -> tuple[str, ...]:
        """Names of the rewards that estimates are sums of (`RewardEstimate.parts`), as far as they count."""
        return ()

    @property
    @abstractmethod
    def num_members(self) -> int:
        """Members K behind each estimate; with fewer than 2 nothing is known of its variance."""

    def reads(self) -> HiddenStates | None:
        """The frozen hidden states that rewards are computed from, if they are: a critic reads at the same depth."""
        return None

    def check(self) -> None:
        """Look whether everything is there that scoring takes, before any model is loaded; a run calls this first.

        Raises:
            ValueError: Something is missing; the message says what.
        """
        return

    # 2. Getting ready.

    def prepare(self, policy: Policy | None) -> None:
        """Load what scoring takes; called once.

        Args:
            policy: The policy to be aligned, whose frozen base a source may use in place of one of its own; `None`
                where there is none.
        """
        return

    @property
    def taps(self) -> tuple[Tap, ...]:
        """What to read off the reference's own pass for `Responses.pooled`; known after `prepare`."""
        return ()

    @property
    def calibrated(self) -> bool:
        """Whether members are comparable and the reference variance is known, as far as this source has them."""
        return True

    @property
    def unit(self) -> str:
        """What rewards are measured in, in words."""
        return "units of the source"

    def calibrate(self, references: Iterable[Responses]) -> None:
        """Fix origins, units and the reference variance on responses of the reference policy, batch by batch.

        Raises:
            ValueError: There are fewer than two responses, or a reward is not finite.
        """
        return

    def scorers(self) -> list[Scorer]:
        """The models that scoring runs besides the policy's own; known after `prepare`. `lit-vapo plan` asks."""
        return []

    # 3. Scoring.

    @abstractmethod
    def score(self, responses: Responses) -> RewardEstimate:
        """Estimate the reward of B responses.

        Raises:
            ValueError: A response cannot be scored; the message says which.
        """

    def estimate(self, responses: Responses) -> RewardEstimate:
        """The same, for those who need a reward of each response.

        Raises:
            ValueError: As `score`, or a response has no reward, or one that is not finite; the message has its prompt.
        """
        found = self.score(responses)
        if bool(found.missing.any()):
            row = int(found.missing.nonzero()[0, 0])
            prompt = responses.prompts[row].content
            if found.applies is not None and not bool(found.applies[row]):
                raise ValueError(
                    f"expected a reward of each response, got none (no source applies) for prompt {prompt!r}; in a "
                    "WeightedSum another source may reward what this one does not"
                )
            raise ValueError(f"expected finite rewards, got {float(found.mean[row])} for prompt {prompt!r}")
        return found

    def linear_mean(self) -> tuple[Tensor, Tensor] | None:
        """Weight (H,) and bias () of the mean reward if it is linear in the last token's `reads`, else `None`.

        A critic starts there.
        """
        return None

    # 4. Checkpoints.

    def own_state(self) -> set[str]:
        """Names in the state dict that a checkpoint keeps, since they cannot be read from where the source is from."""
        return set()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `load_reward` reads.

        Raises:
            ValueError: Nothing of this source can be written.
        """
        raise ValueError(
            "reward: expected a source that a folder can hold, an ensemble or public reward models, got "
            f"{type(self).__name__}; PPO calibrates it at its start"
        )
