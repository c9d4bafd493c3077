"""From rows to tokens, one by one or all of some sources."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from lit_vapo.data.columns import Columns, further
from lit_vapo.data.encoder import Encoder
from lit_vapo.data.formats import read_preference, read_prompt
from lit_vapo.data.mixing import Sources, counts, draw, row_hash, shares
from lit_vapo.data.row import Row, UnusableError, attempt
from lit_vapo.data.sources import LeftOut, each_row, load_rows
from lit_vapo.data.stopping import find_stops
from lit_vapo.data.tokenise import Truncation, fit, load_text_tokenizer, stable_id
from lit_vapo.types import Messages

T = TypeVar("T")


def load_encoder(
    tokenizer: str,
    append_eos: bool = True,
    templated: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    stop_token_ids: list[int] | None = None,
    trust_remote_code: bool = False,
) -> Encoder:
    """What makes tokens of texts and messages.

    Args:
        tokenizer: Folder or hub name of the tokenizer.
        append_eos: As in `Encoder`.
        templated: As in `Encoder`.
        chat_template_kwargs: Arguments of the chat template.
        stop_token_ids: Tokens that end a response, besides those that the model's configuration names.
        trust_remote_code: Whether code that lies beside the tokenizer may run.

    Raises:
        ValueError: There is no such tokenizer, it brings code, or one of the options does not fit it.
    """
    loaded = load_text_tokenizer(tokenizer, trust_remote_code)
    stops = find_stops(tokenizer, loaded, stop_token_ids)
    return Encoder(loaded, stops, template_kwargs=chat_template_kwargs, templated=templated, append_eos=append_eos)


class PairReader(NamedTuple):
    """Reads a preference. It holds what that takes and no more, since processes that prepare batches get a copy.

    Attributes:
        encoder: Makes tokens of it.
        max_length: Most tokens of prompt and response.
        implicit: As in `read_preference`.
        keep: Keep the preference beside its tokens, for models that write it down in another way.
    """

    encoder: Encoder
    max_length: int
    implicit: bool = False
    keep: bool = False

    def read(self, row: Row) -> tuple[dict[str, Any], Truncation]:
        """The tokens of a pair with its place, and what was cut.

        Raises:
            ValueError: The row is no preference, or its responses do not differ within `max_length`.
        """
        preference = read_preference(row, self.implicit)
        pair = self.encoder.pair(preference, row.place)
        sides = (pair.chosen_ids, pair.rejected_ids)
        prompt, (chosen, rejected), cut = fit(
            pair.prompt_ids, sides, self.max_length, self.encoder.tokenizer.bos_token_id
        )
        if chosen == rejected:
            message = (
                f"{row.place}: expected two responses that differ within data.max_length = {self.max_length} "
                "tokens, got the same tokens"
            )
            raise UnusableError(message, "two responses equal within data.max_length")
        identity = preference.prompt.identity
        tokens = {
            "chosen_ids": prompt + chosen,
            "rejected_ids": prompt + rejected,
            "prompt_length": len(prompt),
            **preference.labels._asdict(),
            # Of what the row says, so that neither a template nor a tokenizer moves it to another split.
            "example_id": stable_id(identity, _text(preference.chosen), _text(preference.rejected)),
            "identity": identity,
            "prompt": pair.prompt,
            "place": row.place,
        }
        if self.keep:
            tokens["preference"] = preference
        return tokens, cut

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
        encoder: Makes tokens of it.
        max_prompt_length: Most tokens of a prompt.
        implicit: As in `read_prompt`.
    """

    encoder: Encoder
    max_prompt_length: int
    implicit: bool = False

    def read(self, row: Row) -> dict[str, Any]:
        """The tokens of a prompt.

        Raises:
            ValueError: The row has no prompt, or one that is too long.
        """
        asked = read_prompt(row, self.implicit)
        ids, text = self.encoder.prompt(asked, row.place)
        if not 1 <= len(ids) <= self.max_prompt_length:
            message = f"{row.place}: expected a prompt of 1 … {self.max_prompt_length} tokens (data.max_prompt_length)"
            kind = "a prompt longer than data.max_prompt_length" if ids else "an empty prompt"
            raise UnusableError(f"{message}, got {len(ids)}", kind)
        identity = asked.identity
        return {
            "prompt_ids": ids,
            "prompt": text,
            "asked": asked,
            "columns": further(row.values),
            "example_id": stable_id(identity),
            "identity": identity,
            "place": row.place,
        }


def _text(response: str | Messages) -> str:
    return response if isinstance(response, str) else json.dumps(response, sort_keys=True, ensure_ascii=False)


def read_all(
    sources: Sources,
    key: str,
    read: Callable[[Row], T],
    skip_invalid: bool,
    columns: Columns | None = None,
    sample: int | None = None,
) -> list[T]:
    """What `read` makes of the rows of some sources; of a mapping, as many as its ratios allow.

    Args:
        sources: Files or hub names, or a mapping from them to ratios.
        key: The configuration key they were given under, for messages.
        read: Reads one row; raises ValueError where it is invalid.
        skip_invalid: Leave invalid rows out and warn of their number.
        columns: Names of columns.
        sample: Read at most so many rows; all are looked at, so that the order of a file plays no part.

    Raises:
        ValueError: As in `load_rows`, `each_row` and `shares`, or a source's share is less than a row.
    """
    if not isinstance(sources, dict):
        return each_row(_some(load_rows(sources, key, columns), sample), read, key, skip_invalid)

    def hashed(row: Row) -> tuple[int, T]:
        return row_hash(row), read(row)

    parts = shares(sources, key)
    most = [sample and math.ceil(sample * part - 1e-6) for part in parts]
    found = [
        each_row(_some(load_rows(source, key, columns), number), hashed, key, skip_invalid)
        for source, number in zip(sources, most, strict=True)
    ]
    wanted = counts([len(rows) for rows in found], parts, sample)
    if not all(wanted):
        sizes = {source: len(rows) for source, rows in zip(sources, found, strict=True)}
        drawn = "" if sample is None else f" in a sample of {sample} (data.sample)"
        raise ValueError(
            f"{key}: expected ratios that leave a row of every source{drawn}, got {sources} of {sizes} rows"
        )
    return [
        rows[i][1]
        for rows, count in zip(found, wanted, strict=True)
        for i in draw([identity for identity, _ in rows], count)
    ]


def _some(rows: list[Row], count: int | None) -> list[Row]:
    """At most so many rows, in their order: those with the lowest hashes."""
    return rows if count is None else [rows[i] for i in sorted(draw([row_hash(row) for row in rows], count))]


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
        found.setdefault(tokens["identity"], tokens)
        if len(found) == count:
            break
    left_out.refuse(total)
    left_out.warn(total)
    return list(found.values())
