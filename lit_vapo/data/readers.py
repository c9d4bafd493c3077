"""From rows to tokens, one by one or all of some sources."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from lit_vapo.data.columns import Columns
from lit_vapo.data.formats import read_preference, read_prompt
from lit_vapo.data.mixing import Sources, counts, draw, row_hash, shares
from lit_vapo.data.row import Row, UnusableError, attempt
from lit_vapo.data.sources import LeftOut, each_row, load_rows
from lit_vapo.data.tokenise import Truncation, tokenise_preference, tokenise_prompt

T = TypeVar("T")


class PairReader(NamedTuple):
    """Reads a preference. It holds what that takes and no more, since processes that prepare batches get a copy.

    Attributes:
        tokenizer: The tokenizer.
        max_length: Most tokens of prompt and response.
        append_eos: End responses with the end of sequence.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    append_eos: bool

    def read(self, row: Row) -> tuple[dict[str, Any], Truncation]:
        """The tokens of a pair with its place, and what was cut.

        Raises:
            ValueError: The row is no preference, or its responses do not differ within `max_length`.
        """
        preference = read_preference(row, self.tokenizer)
        tokens, cut = tokenise_preference(preference, self.tokenizer, self.max_length, self.append_eos)
        if tokens["chosen_ids"] == tokens["rejected_ids"]:
            message = (
                f"{row.place}: expected two responses that differ within data.max_length = {self.max_length} "
                "tokens, got the same tokens"
            )
            raise UnusableError(message, "two responses equal within data.max_length")
        return {**tokens, "place": row.place}, cut

    def truncation(self, cuts: Iterable[Truncation], key: str) -> str | None:
        """What was cut, in words; None if nothing was."""
        cuts = list(cuts)
        prompts, responses = sum(cut.prompts for cut in cuts), sum(cut.responses for cut in cuts)
        if not prompts and not responses:
            return None
        return (
            f"{key}: data.max_length = {self.max_length} cut the beginning off {prompts} prompts and the end off "
            f"{responses} responses, of {len(cuts)} pairs"
        )


class PromptReader(NamedTuple):
    """Reads a prompt.

    Attributes:
        tokenizer: The tokenizer.
        max_prompt_length: Most tokens of a prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    max_prompt_length: int

    def read(self, row: Row) -> dict[str, Any]:
        """The tokens of a prompt.

        Raises:
            ValueError: The row has no prompt, or one that is too long.
        """
        prompt = read_prompt(row, self.tokenizer)
        return tokenise_prompt(prompt, self.tokenizer, self.max_prompt_length, row.place)


def read_all(
    sources: Sources, key: str, read: Callable[[Row], T], skip_invalid: bool, columns: Columns | None = None
) -> list[T]:
    """What `read` makes of the rows of some sources; of a mapping, as many as its ratios allow.

    Args:
        sources: Files or hub names, or a mapping from them to ratios.
        key: The configuration key they were given under, for messages.
        read: Reads one row; raises ValueError where it is invalid.
        skip_invalid: Leave invalid rows out and warn of their number.
        columns: Names of columns.

    Raises:
        ValueError: As in `load_rows`, `each_row` and `shares`, or a source's share is less than a row.
    """
    if not isinstance(sources, dict):
        return each_row(load_rows(sources, key, columns), read, key, skip_invalid)

    def hashed(row: Row) -> tuple[int, T]:
        return row_hash(row), read(row)

    parts = shares(sources, key)
    found = [each_row(load_rows(source, key, columns), hashed, key, skip_invalid) for source in sources]
    wanted = counts([len(rows) for rows in found], parts)
    if not all(wanted):
        sizes = {source: len(rows) for source, rows in zip(sources, found, strict=True)}
        raise ValueError(f"{key}: expected ratios that leave a row of every source, got {sources} of {sizes} rows")
    return [
        rows[i][1]
        for rows, count in zip(found, wanted, strict=True)
        for i in draw([identity for identity, _ in rows], count)
    ]


def first_prompts(
    rows: Iterable[Row], reader: PromptReader, count: int, key: str, skip_invalid: bool
) -> list[dict[str, Any]]:
    """The first `count` different prompts; no row after them is read.

    Args:
        rows: Rows of prompts or preferences.
        reader: Reads a row.
        count: How many prompts, at most.
        key: The configuration key of the rows, for messages.
        skip_invalid: Leave invalid rows out and warn of their number.

    Raises:
        ValueError: A row is invalid and `skip_invalid` is off.
    """
    found: dict[str, dict[str, Any]] = {}
    left_out = LeftOut(key, skip_invalid)
    total = 0
    for row in rows:
        total += 1
        try:
            tokens = attempt(reader.read, row)
        except ValueError as error:
            left_out.add(error)
            continue
        found.setdefault(tokens["prompt"], tokens)
        if len(found) == count:
            break
    left_out.refuse(total)
    left_out.warn(total)
    return list(found.values())
