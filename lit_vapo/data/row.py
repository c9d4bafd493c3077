"""A row as it was read, before anything is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Row(NamedTuple):
    """One row of a data set.

    Attributes:
        values: Column name to value.
        place: Where it stands, for messages: `file, line 7`.
        problem: What is wrong with the row itself, in the words of an error message; it then has no values.
    """

    values: Mapping[str, Any]
    place: str
    problem: str | None = None

    def sound(self) -> Row:
        """The row itself.

        Raises:
            ValueError: It could not be read.
        """
        if self.problem is not None:
            raise ValueError(f"{self.place}: {self.problem}")
        return self


class UnusableError(ValueError):
    """A row that is well written and of no use, as real data sets have some: an empty response, say.

    Args:
        message: The whole message, with the row's place.
        kind: What such rows have in common, for a count of them: `an empty response`.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        """Processes that prepare batches hand errors on as they are."""
        return type(self), (str(self), self.kind)


def attempt(read: Callable[[Row], T], row: Row) -> T:
    """What `read` makes of a row.

    Raises:
        ValueError: The row could not be read, is invalid, or is nested more deeply than Python follows.
    """
    try:
        return read(row.sound())
    except RecursionError as error:
        raise ValueError(f"{row.place}: expected values that are nested less deeply") from error


def shown(value: Any, length: int = 60) -> str:
    """A value for a message: in one line, and not longer than that.

    Examples:
        >>> shown("word " * 100, 20)
        "'word word word wor…"
        >>> shown([1, 2])
        'list'
    """
    if isinstance(value, (list, tuple, dict, bytes)):
        return type(value).__name__
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except ValueError:  # an integer with more digits than Python writes
        return type(value).__name__
    return text if len(text) <= length else text[: length - 1] + "…"
