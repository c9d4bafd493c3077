"""From a row in one of the usual shapes to what it says: a prompt, or a preference.

The shapes are those of TRL: an explicit prompt (RewardBench's, too), an implicit one (the two responses are whole
dialogues that share their beginning), and conversations of role/content messages. And that of LLMBar: two outputs and
the number of the better one. No tokenizer plays a part here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from lit_vapo.data.columns import TURN, advice, listed
from lit_vapo.data.conversation import Preference
from lit_vapo.data.labels import read_labels
from lit_vapo.data.row import Row, UnusableError, shown
from lit_vapo.data.schema import PairColumns, PromptColumns, validated
from lit_vapo.types import Message, Messages, Prompt

Said = str | Messages


def read_preference(row: Row, implicit: bool = False) -> Preference:
    """The preference that a row states.

    Args:
        row: The row.
        implicit: Texts without a prompt begin with it, whether they look like dialogues or not.

    Raises:
        ValueError: A column is missing or holds something else, or the prompt cannot be told from the responses.
        UnusableError: A response is empty, or both are the same.
    """
    row = _numbered(row)
    prompt, chosen, rejected = _parts(row, implicit)
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if _empty(response):
            message = f"{row.place}: expected a response in column {name!r}, got an empty one"
            raise UnusableError(message, "an empty response")
    if chosen == rejected:
        message = f"{row.place}: expected two different responses, got the same in 'chosen' and 'rejected'"
        raise UnusableError(message, "two equal responses")
    return Preference(prompt, chosen, rejected, read_labels(row))


def read_prompt(row: Row, implicit: bool = False) -> Prompt:
    """What a row asks: its column `prompt`, or what `chosen` and `rejected` share.

    Args:
        row: The row.
        implicit: As in `read_preference`.

    Raises:
        ValueError: There is none, or as in `read_preference`.
        UnusableError: It is empty.
    """
    row = _numbered(row)
    if "chosen" in row.values and "rejected" in row.values:
        prompt = _parts(row, implicit)[0]
    else:
        columns = validated(PromptColumns, row)
        if columns.prompt is None:
            raise ValueError(_no_prompt(row))
        prompt = _prompt(row, columns, cast("Said", columns.prompt))
    if not prompt.content:
        raise UnusableError(f"{row.place}: expected a prompt in column 'prompt', got an empty one", "an empty prompt")
    return prompt


def _numbered(row: Row) -> Row:
    """LLMBar's shape in the usual columns (`label` is the number of the better output); any other row as it is."""
    values = row.values
    if "chosen" in values or not {"input", "output_1", "output_2"} <= values.keys():
        return row
    label = values.get("label")
    if label not in (1, 2) or isinstance(label, bool):
        raise ValueError(f"{row.place}: expected 1 or 2 in column 'label', got {shown(label)}")
    better, other = ("output_1", "output_2") if label == 1 else ("output_2", "output_1")
    columns = {"prompt": values["input"], "chosen": values[better], "rejected": values[other]}
    return row._replace(values={**values, **columns})


def _parts(row: Row, implicit: bool) -> tuple[Prompt, Said, Said]:
    """The prompt of a pair, and both responses without it."""
    columns = validated(PairColumns, row)
    prompt = cast("Said | None", columns.prompt)
    chosen, rejected = cast("tuple[Said, Said]", (columns.chosen, columns.rejected))
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        text, chosen, rejected = _texts(row, prompt, chosen, rejected, implicit)
        return _prompt(row, columns, text), chosen, rejected
    if isinstance(chosen, str) and isinstance(rejected, str):
        # Beside messages, a text is what the assistant says.
        answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    elif isinstance(chosen, list) and isinstance(rejected, list):
        answers = [chosen, rejected]
    else:
        raise ValueError(f"{row.place}: expected texts or messages in both 'chosen' and 'rejected', got one of each")
    shared, answers = _conversations(row, prompt, answers)
    return _prompt(row, columns, shared), answers[0], answers[1]


def _prompt(row: Row, columns: PromptColumns, content: Said) -> Prompt:
    """The prompt with what further columns say of it."""
    if isinstance(content, str):
        for name, value in (("system", columns.system), ("tools", columns.tools)):
            if value:
                raise ValueError(
                    f"{row.place}: expected messages beside the column {name!r}, got a text; write messages, or leave "
                    f"the column out with data.columns={{{name}: null}}"
                )
        return Prompt(content)
    if not content:
        none = f"{row.place}: expected a prompt of at least one message, got none"
        raise ValueError(_no_prompt(row) if row.values.get("prompt") is None else none)
    system = {"role": "system", "content": columns.system}
    turn = next((message for message in content if message["role"] in ("system", "developer")), None)
    if columns.system and turn is None:
        content = [system, *content]
    elif columns.system and turn and (turn.get("content") or "").strip() != columns.system.strip():
        raise ValueError(
            f"{row.place}: expected column 'system' to say what the system's message says, got {shown(columns.system)}"
        )
    return Prompt(content, columns.tools or None)


def _no_prompt(row: Row) -> str:
    return f"{row.place}: expected column 'prompt', got {listed(row.values)}; {advice(row.values)}"


# Texts.


def _texts(row: Row, prompt: str | None, chosen: str, rejected: str, implicit: bool) -> tuple[str, str, str]:
    if prompt is None:
        prompt = shared_prompt(chosen, rejected, implicit)
        if prompt is None:
            raise ValueError(_no_prompt(row) + "; or {prompt: null} if both responses begin with it")
    elif TURN not in prompt or not (chosen.startswith(prompt) or rejected.startswith(prompt)):
        return prompt, chosen, rejected
    # A dialogue, and whole dialogues beside it.
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.startswith(prompt):
            raise ValueError(
                f"{row.place}: expected both responses to begin with the prompt, or none; {name!r} does not"
            )
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def shared_prompt(chosen: str, rejected: str, implicit: bool = False) -> str | None:
    """What two dialogues share, up to and with the last `Assistant:` they have in common (HH-RLHF).

    Args:
        chosen: A whole dialogue.
        rejected: The other.
        implicit: Without such a mark, take all that they share, up to its last space, so that no word is torn apart.

    Returns:
        The prompt; `None` if there is no mark.
    """
    common = chosen[: _shared(chosen, rejected)]
    turn = common.rfind(TURN)
    if turn >= 0:
        return common[: turn + len(TURN)]
    return common[: max(0, common.rfind(" "))] if implicit else None


# Messages.


def _conversations(row: Row, prompt: Said | None, answers: list[Messages]) -> tuple[Messages, list[Messages]]:
    """The messages that both responses answer, and those of the two responses."""
    said = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if prompt is not None:
        if all(_begins(answer, said) for answer in answers):
            # Some data sets (UltraFeedback, say) give the prompt in its column and in the conversations again.
            return said, [answer[len(said) :] for answer in answers]
        if not any(message["role"] in ("user", "system", "developer") for answer in answers for message in answer):
            return said, answers
    count = _shared(*[[_content(message) for message in answer] for answer in answers])
    # Dialogues may part at a user's message; the responses then begin with the assistant's one before.
    while 0 < count < min(map(len, answers)) and any(answer[count]["role"] != "assistant" for answer in answers):
        count -= 1
    shared = answers[0][:count]
    if prompt is not None and not _begins(shared[-len(said) :], said):
        raise ValueError(
            f"{row.place}: expected in column 'prompt' the beginning of the conversations in 'chosen' and 'rejected', "
            f"or the last of what they share, got {shown(said[-1].get('content') if said else '')}"
        )
    return shared, [answer[count:] for answer in answers]


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _begins(messages: Messages, said: Messages) -> bool:
    return len(messages) >= len(said) and all(map(_same, messages, said))


def _same(one: Message, other: Message) -> bool:
    return _content(one) == _content(other)


def _content(message: Message) -> tuple[Any, ...]:
    """What a message says; its other keys (a name, say) are no part of that."""
    return message["role"], (message.get("content") or "").strip(), message.get("tool_calls") or None


def _empty(response: Said) -> bool:
    if isinstance(response, str):
        return not response.strip()
    return not any((m.get("content") or "").strip() or m.get("tool_calls") for m in response)
