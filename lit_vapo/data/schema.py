"""What the columns of a row may hold, checked where they are read; every error says what was expected and received."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Required, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Tag, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import TypedDict

from lit_vapo.data.columns import listed
from lit_vapo.data.row import Row, shown

S = TypeVar("S", bound=BaseModel)
# By these names pydantic tells the kinds of a value apart; they stand in the path of an error, and no key has them.
TEXT, MESSAGES, PARTS = TAGS = ("(text)", "(messages)", "(parts)")
# The beginning of a list of messages that was written into a text: as JSON, or as Python shows it.
WRITTEN = re.compile(r"\s*\[\s*\{\s*['\"](role|content)['\"]\s*:")
STRICT = ConfigDict(strict=True, extra="allow")
# What a column, or a key of a message, is expected to hold.
EXPECTED = {
    **dict.fromkeys(("prompt", "chosen", "rejected"), "text or messages"),
    **dict.fromkeys(("system", "subset", "text"), "text"),
    "tools": "a list of JSON schemas, or a text of JSON that holds one,",
    "tie": "true or false",
    "role": "a role (text)",
    "content": "text, parts of text or null",
    "tool_calls": "a list of tool calls (objects)",
    "type": "'text', since models read nothing else,",
}


def expect(words: str, got: str | None = None) -> PydanticCustomError:
    """An error for a validator: what was expected, and what was received if that is not the value as a whole."""
    return PydanticCustomError("expected", "{words}", {"words": words, "got": got})


def without_nulls(value: Any) -> Any:
    """A value without keys whose value is null, at any depth.

    Parquet and `datasets` give every message the keys of all others. So what a message says is what is not null.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise expect("text", f"half of a character, {text[error.start]!a}, at {error.start + 1}") from error
    return text


def _writable(value: Any) -> Any:
    """A value that can be written as JSON, as chat templates and identities do."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise expect("values that JSON has", str(error)) from error
    _unicode(text)
    return value


def _complete(message: dict[str, Any]) -> dict[str, Any]:
    if "content" not in message and not message.get("tool_calls"):
        raise expect("content or tool_calls", f"the keys {sorted(message)}")
    return _writable(message)


def _joined(parts: list[dict[str, str]]) -> str:
    """Parts of text as one text: templates for text alone would show the list."""
    return "".join(part["text"] for part in parts)


def _stored(value: Any) -> Any:
    """Messages that were stored as a text of JSON; any other value as it is."""
    if not (isinstance(value, str) and WRITTEN.match(value) and value.rstrip().endswith("]")):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if isinstance(found, list) and all(isinstance(message, dict) for message in found):
        return found
    raise expect("text or messages", "a text that looks like messages and is no list of them in JSON")


def _stored_tools(value: Any) -> Any:
    """Tools that were stored as a text of JSON, as `datasets` has it; any other value as it is."""
    if not isinstance(value, str) or not value.strip():
        return without_nulls(value) or None
    try:
        return without_nulls(json.loads(value))
    except ValueError as error:
        raise expect(EXPECTED["tools"], shown(value)) from error


def _number(value: Any) -> Any:
    """A finite number; of Parquet's kinds, too."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        raise expect("a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise expect("a number", "one too large to compute with") from error
    if not math.isfinite(number):
        raise expect("a number")
    return number


def _refuse(words: str) -> Any:
    raise expect(words)


def _kind(several: str) -> Discriminator:
    """Tells a text from a list, so that an error speaks of the one that was meant."""
    return Discriminator(lambda value: TEXT if isinstance(value, str) else several if isinstance(value, list) else None)


Text = Annotated[str, AfterValidator(_unicode)]
Number = Annotated[float, BeforeValidator(_number)]


class _Part(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]
    type: Annotated[str, AfterValidator(lambda kind: kind if kind == "text" else _refuse(EXPECTED["type"]))]
    text: Text


class _Message(TypedDict, total=False):
    __pydantic_config__ = STRICT  # type: ignore[misc]
    role: Required[Annotated[Text, AfterValidator(lambda role: role or _refuse(EXPECTED["role"]))]]
    content: Annotated[
        Annotated[Text, Tag(TEXT)] | Annotated[list[_Part], AfterValidator(_joined), Tag(PARTS)], _kind(PARTS)
    ]
    tool_calls: list[dict[str, Any]]


Message = Annotated[_Message, BeforeValidator(without_nulls), AfterValidator(_complete)]
Said = Annotated[
    Annotated[Text, Tag(TEXT)] | Annotated[list[Message], Tag(MESSAGES)],
    _kind(MESSAGES),
    BeforeValidator(_stored),
]


def _none(value: Any) -> None:
    """Nothing; a list may be there and be empty."""
    if value is not None and value != [] and value != "":
        raise expect("no images, since models read text alone (data.columns={images: null} leaves them out),")


class PromptColumns(BaseModel):
    """Columns that say what is to be answered; any may be null."""

    model_config = ConfigDict(strict=True)

    prompt: Said | None = None
    system: Text | None = None
    tools: Annotated[list[dict[str, Any]] | None, BeforeValidator(_stored_tools), AfterValidator(_writable)] = None
    images: Annotated[None, BeforeValidator(_none)] = None


class PairColumns(PromptColumns):
    """Columns of a preference that hold what was said."""

    chosen: Said
    rejected: Said


def validated(model: type[S], row: Row) -> S:
    """A row's columns.

    Raises:
        ValueError: The row could not be read, a column is missing, or one holds something else.
    """
    try:
        return model.model_validate(dict(row.sound().values))
    except ValidationError as error:
        raise ValueError(f"{row.place}: {_sentence(error.errors(include_url=False)[0], row)}") from error


def _sentence(error: ErrorDetails, row: Row) -> str:
    """What was expected, where, and what was received, in one line."""
    # The path of a value: its column, the number of a message, a key.
    steps = [step for step in error["loc"] if step not in TAGS]
    context = error.get("ctx", {})
    if not steps:
        return f"expected {context['words']}, got {context['got']}"
    column = f"column {steps[0]!r}"
    if error["type"] != "missing":
        received = shown(error["input"])
    elif len(steps) == 1:
        return f"expected {column}, got {listed(row.values)}; data.columns maps other names to ours"
    else:
        received = f"the keys {sorted(error['input'])}"
    words = context.get("words") or EXPECTED.get(str(steps[-1]), "an object")
    where = [f"number {step + 1}" if isinstance(step, int) else repr(step) for step in steps[1:]]
    return f"expected {words} in {', '.join([column, *where])}, got {context.get('got') or received}"
