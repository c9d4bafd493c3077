"""Names of columns: a file's own, and those that this package reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from lit_vapo.data.row import Row, shown

# Columns that are read; docs/data.md says what they mean.
KNOWN = (
    *("prompt", "chosen", "rejected", "system", "tools", "images"),
    *("margin", "agreement", "tie", "weight", "subset"),
)
# Columns that hold prompts in public data sets, for messages.
PROMPT_LIKE = (
    *("question", "instruction", "input", "query", "system", "prompts", "messages", "conversation", "conversations"),
    *("user", "context", "text", "post", "problem"),
)
# Columns that say what is asked, and those that make a row LLMBar's.
ASKED = ("prompt", "system", "tools", "images")
NUMBERED = ("input", "output_1", "output_2", "label")
# What begins a response in a dialogue written as one text (HH-RLHF).
TURN = "\n\nAssistant:"
# Rows of a source that are looked at to see of what kind all of them are.
LOOK = 1000


class Columns:
    """Where a file's columns have other names.

    Args:
        names: Our name of a column to the file's; a file that has ours only keeps it. `None` leaves a column out;
            for `prompt` it says that both responses begin with their prompt, whatever the column `prompt` says.

    Raises:
        ValueError: There is no column of that name to read.

    Examples:
        >>> Columns({"prompt": "question"}).rename(Row({"question": "Why?", "id": 3}, "here")).values
        {'id': 3, 'prompt': 'Why?'}
    """

    def __init__(self, names: Mapping[str, str | None] | None = None) -> None:
        self.names = dict(names or {})
        for name in self.names:
            if name not in KNOWN:
                raise ValueError(f"data.columns: expected names among {', '.join(KNOWN)}, got {name!r}")

    @property
    def implicit(self) -> bool:
        """Whether prompts are what both responses begin with, dialogues or not."""
        return "prompt" in self.names and self.names["prompt"] is None

    def rename(self, row: Row) -> Row:
        """The row with our names."""
        if not self.names or row.problem:
            return row
        given = row.values
        taken = {name: own for name, own in self.names.items() if own in given}
        values = {name: value for name, value in given.items() if name not in taken.values()}
        values |= {name: given[own] for name, own in taken.items() if own is not None}
        for name, own in self.names.items():
            # A row of a prompt alone keeps it: it has nothing else.
            if own is None and (name != "prompt" or "chosen" in values):
                values.pop(name, None)
            elif own is not None and name not in values:
                return Row({}, row.place, f"expected column {own!r} (data.columns.{name}), got {listed(given)}")
        return row._replace(values=values)

    def of_one_kind(self, rows: Iterable[Row], all_at_once: bool) -> Iterator[Row]:
        """Rows of one source with our names; one that lacks the prompt that others have is marked.

        Args:
            rows: Rows of one source.
            all_at_once: Look at all of them before the first is handed on; else at the first thousand.

        Raises:
            ValueError: All rows write their prompt twice.
        """
        renamed = map(self.rename, rows)
        head = list(renamed if all_at_once else islice(renamed, LOOK))
        _refuse_twice(head)
        prompted = any(_prompt(row) is not None for row in head)
        for row in chain(head, renamed):
            # One that merely forgot its prompt would pass for a dialogue with an implicit one.
            if row.problem is None and prompted and _prompt(row) is None:
                problem = "expected a prompt in column 'prompt', as other rows of the source have, got none"
                yield Row({}, row.place, problem)
            elif row.problem is None and not prompted and _prompt(row) is not None:
                yield Row({}, row.place, "expected column 'prompt' in all rows of a source or in none")
            else:
                yield row


def further(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says besides its prompt, for rewards and for records, which are JSON.

    Of a row that is a preference this leaves out what makes it one, too. Values that JSON cannot say (dates, images,
    NaN) stay behind.

    Args:
        values: The row, with our names.

    Examples:
        >>> further({"prompt": "2 + 2?", "answer": 4, "subset": "sums"})
        {'answer': 4, 'subset': 'sums'}
        >>> further({"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "subset": "sums", "level": 1})
        {'level': 1}
    """
    own = set(ASKED)
    if "chosen" in values:
        own |= set(KNOWN)
    elif values.keys() >= {*NUMBERED[:3]}:
        own |= {*KNOWN, *NUMBERED}
    return {name: value for name, value in values.items() if name not in own and _writable(value)}


def _writable(value: Any) -> bool:
    """Whether JSON can say a value."""
    if value is None or type(value) in (str, bool):
        return True
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def listed(names: Iterable[str]) -> str:
    """Names of columns for a message.

    Examples:
        >>> listed(["b", "a"])
        "columns ['a', 'b']"
    """
    given = sorted(str(name) for name in names)
    return f"columns {given[:20]}" + (f" and {len(given) - 20} more" if len(given) > 20 else "")


def advice(names: Iterable[str]) -> str:
    """How a row without a prompt may get one, in words: which columns look like it, and the option."""
    alike = [name for name in PROMPT_LIKE if name in set(names)]
    if not alike:
        return "data.columns says which column holds the prompt, as in {prompt: my_column}"
    plural = "columns look" if len(alike) > 1 else "column looks"
    return f"the {plural} like a prompt: {', '.join(alike)}; choose with data.columns, as in {{prompt: {alike[0]}}}"


def _prompt(row: Row) -> Any:
    """The prompt of a row in its usual column, or in LLMBar's."""
    found = row.values.get("prompt")
    return row.values.get("input") if found is None and "output_1" in row.values else found


def _refuse_twice(rows: Sequence[Row]) -> None:
    """Refuse responses that begin with their prompt, in all rows: one such row may be an echo, all are no accident."""
    found = [(row, [row.values.get(name) for name in ("prompt", "chosen", "rejected")]) for row in rows]
    texts = [(row, parts) for row, parts in found if all(isinstance(part, str) and part.strip() for part in parts)]
    # Of whole dialogues, each row says where its prompt ends.
    texts = [(row, parts) for row, parts in texts if TURN not in str(parts[0])]
    if len(texts) > 1 and all(str(text).startswith(str(prompt)) for _, (prompt, *both) in texts for text in both):
        first, (prompt, *_) = texts[0]
        raise ValueError(
            f"{first.place}: expected responses without their prompt, got texts that begin with it in all rows "
            f"({shown(prompt)}); write them without it, or leave the column out with data.columns={{prompt: null}}"
        )
