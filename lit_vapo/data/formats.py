"""From a row in one of the usual shapes to plain texts.

The shapes are those of TRL: an explicit prompt (RewardBench's, too), an implicit one (the two responses are whole
dialogues that share their beginning), and conversations of role/content messages, which go through the tokenizer's
chat template. And that of LLMBar: two outputs and the number of the better one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lit_vapo.data.labels import read_labels
from lit_vapo.data.row import Row, UnusableError

TURN = "\n\nAssistant:"
Messages = list[dict[str, str]]


class Preference(NamedTuple):
    """A stated preference, as texts.

    Attributes:
        prompt: What both responses answer.
        chosen: The preferred response.
        rejected: The other one.
        margin: By how much it was preferred, in units of reward.
        templated: The texts hold a chat template's special tokens, so none are to be added.
        probability: Probability that it is the better one, in [0.5, 1]; 0.5 for a tie.
        weight: How often the pair counts.
        subset: Name of the part of the data set it belongs to.
    """

    prompt: str
    chosen: str
    rejected: str
    margin: float
    templated: bool
    probability: float = 1.0
    weight: float = 1.0
    subset: str | None = None


class Prompt(NamedTuple):
    """A prompt, as text; `templated` as in `Preference`, and `messages` are those the text was made of, if it was."""

    prompt: str
    templated: bool
    messages: Messages | None = None


def read_preference(row: Row, tokenizer: PreTrainedTokenizerBase) -> Preference:
    """The preference that a row states.

    Raises:
        ValueError: A column is missing, of another type or out of its range, a response is empty, both are the
            same, or messages meet a tokenizer without a chat template.
    """
    row = _numbered(row)
    chosen, rejected = column(row, "chosen"), column(row, "rejected")
    labels = read_labels(row)
    if isinstance(chosen, list) or isinstance(rejected, list):
        prompt, chosen, rejected = _conversation(row, tokenizer)
        templated = True
    else:
        templated = False
        if row.values.get("prompt") is not None:
            prompt = _text(row, "prompt")
        else:
            prompt = shared_prompt(chosen, rejected)
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.strip():
            message = f"{row.place}: expected a response in column {name!r}, got an empty one"
            raise UnusableError(message, "an empty response")
    if chosen == rejected:
        message = f"{row.place}: expected two different responses, got the same in 'chosen' and 'rejected'"
        raise UnusableError(message, "two equal responses")
    return Preference(
        prompt, chosen, rejected, labels.margin, templated, labels.probability, labels.weight, labels.subset
    )


def read_prompt(row: Row, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The prompt of a row: its column `prompt`, or what `chosen` and `rejected` share.

    Raises:
        ValueError: There is none, or it is empty.
    """
    row = _numbered(row)
    value = row.values.get("prompt")
    if value is None and "chosen" in row.values:
        preference = read_preference(row, tokenizer)
        found = Prompt(preference.prompt, preference.templated, _turns(row)[0] if preference.templated else None)
    elif isinstance(value, str) and isinstance(row.values.get("chosen"), list):
        # As in `_turns`: a text beside messages is what the user says.
        found = _templated(row, [{"role": "user", "content": value}], tokenizer)
    elif isinstance(value, list):
        found = _templated(row, _messages(row, "prompt"), tokenizer)
    else:
        found = Prompt(_text(row, "prompt"), False)
    if not found.prompt:
        raise ValueError(f"{row.place}: expected a prompt in column 'prompt', got an empty one")
    return found


def _templated(row: Row, messages: Messages, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    return Prompt(_template(row, messages, tokenizer, respond=True), True, messages)


def _numbered(row: Row) -> Row:
    """LLMBar's shape in the usual columns (`label` is the number of the better output); any other row as it is."""
    values = row.values
    if "chosen" in values or not {"input", "output_1", "output_2"} <= values.keys():
        return row
    label = values.get("label")
    if label not in (1, 2) or isinstance(label, bool):
        raise ValueError(f"{row.place}: expected 1 or 2 in column 'label', got {label!r}")
    better, other = ("output_1", "output_2") if label == 1 else ("output_2", "output_1")
    columns = {"prompt": values["input"], "chosen": values[better], "rejected": values[other]}
    return Row({**values, **columns}, row.place)


def column(row: Row, name: str) -> Any:
    """A column's text or messages.

    Raises:
        ValueError: The column is missing, or holds something else.
    """
    if name not in row.values:
        raise ValueError(f"{row.place}: expected column {name!r}, got columns {sorted(row.values)}")
    value = row.values[name]
    if not isinstance(value, (str, list)):
        raise ValueError(f"{row.place}: expected text or messages in column {name!r}, got {type(value).__name__}")
    return value


def shared_prompt(chosen: str, rejected: str) -> str:
    """What two dialogues share, up to and with the last `Assistant:` they have in common (HH-RLHF)."""
    size = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    common = chosen[:size]
    turn = common.rfind(TURN)
    if turn >= 0:
        return common[: turn + len(TURN)]
    # No dialogue markers: cut at a space, so that no word is torn apart.
    return common[: common.rfind(" ")] if " " in common else ""


def _text(row: Row, name: str) -> str:
    value = column(row, name)
    if not isinstance(value, str):
        raise ValueError(f"{row.place}: expected text in column {name!r}, got {type(value).__name__}")
    return value


def _messages(row: Row, name: str) -> Messages:
    value = column(row, name)
    if not isinstance(value, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    ):
        raise ValueError(f"{row.place}: expected a list of messages with role and content (texts) in column {name!r}")
    return value


def _template(row: Row, messages: Messages, tokenizer: PreTrainedTokenizerBase, respond: bool) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            f"{row.place}: expected a tokenizer with a chat template for conversational data, got "
            f"{tokenizer.name_or_path!r}, which has none"
        )
    if not messages:
        raise ValueError(f"{row.place}: expected a prompt of at least one message, got none")
    return apply_template(messages, tokenizer, respond, row.place)


def apply_template(messages: Messages, tokenizer: PreTrainedTokenizerBase, respond: bool, place: str) -> str:
    """Messages as the tokenizer's chat template writes them.

    Args:
        messages: The messages.
        tokenizer: Whose template.
        respond: Open the assistant's turn at the end.
        place: Where the messages are from, for the error.

    Raises:
        ValueError: The template refuses them.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=respond))
    except Exception as error:  # whatever the template raises, such as that roles must alternate
        raise ValueError(
            f"{place}: expected messages that the chat template of {tokenizer.name_or_path!r} takes, got: {error}"
        ) from error


def end_at_stop(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Without the white space that a template writes after a turn's stop token, where a sampled response ends."""
    stripped = text.rstrip()
    return stripped if stripped.endswith(tuple(tokenizer.all_special_tokens)) else text


def _turns(row: Row) -> tuple[Messages, list[Messages]]:
    """The messages that both responses answer, and those of the two responses."""
    answers = [_messages(row, "chosen"), _messages(row, "rejected")]
    if row.values.get("prompt") is not None:
        value = column(row, "prompt")
        shared = _messages(row, "prompt") if isinstance(value, list) else [{"role": "user", "content": value}]
        if all(answer[: len(shared)] == shared for answer in answers):
            # Some data sets (UltraFeedback, say) give the prompt in its column and in the conversations again.
            answers = [answer[len(shared) :] for answer in answers]
    else:
        count = next((i for i, (a, b) in enumerate(zip(*answers, strict=False)) if a != b), min(map(len, answers)))
        # Dialogues may part at a user's message; the responses then begin with the assistant's one before.
        while 0 < count < min(map(len, answers)) and any(a[count]["role"] != "assistant" for a in answers):
            count -= 1
        shared, answers = answers[0][:count], [a[count:] for a in answers]
    return shared, answers


def _conversation(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    shared, answers = _turns(row)
    prompt = _template(row, shared, tokenizer, respond=True)
    texts = []
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not "".join(message["content"] for message in answer).strip():
            texts.append("")
            continue
        whole = _template(row, shared + answer, tokenizer, respond=False)
        if not whole.startswith(prompt):
            raise ValueError(f"{row.place}: expected {name!r} to continue the prompt under the chat template")
        texts.append(end_at_stop(whole[len(prompt) :], tokenizer))
    return prompt, texts[0], texts[1]
