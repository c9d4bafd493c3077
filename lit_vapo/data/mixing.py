"""Several sources in given shares: drawn from what is held, or interleaved as it streams."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import TypeVar

from lit_vapo.data.columns import Columns
from lit_vapo.data.row import Row
from lit_vapo.data.sources import iterate_rows
from lit_vapo.data.tokenise import stable_id

T = TypeVar("T")
# Files or hub names; a mapping gives each of them its share of the rows.
Sources = str | list[str] | dict[str, float]


def shares(ratios: Mapping[str, float], key: str) -> list[float]:
    """Ratios made to sum to one.

    Raises:
        ValueError: There is none, or one is not above 0.
    """
    if not ratios:
        raise ValueError(f"{key}: expected at least one source, got an empty mapping")
    for source, ratio in ratios.items():
        if not (ratio > 0 and math.isfinite(ratio)):
            raise ValueError(f"{key}: expected ratios above 0, got {ratio} for {source!r}")
    return [ratio / sum(ratios.values()) for ratio in ratios.values()]


def counts(sizes: Sequence[int], parts: Sequence[float], most: int | None = None) -> list[int]:
    """How many rows of each source make the largest mixture in which none comes twice.

    With n_i rows of source i and share r_i, the mixture has N = min_i n_i / r_i rows, r_i N of them (rounded down) from
    source i.

    Args:
        sizes: Rows there are of each source.
        parts: Share of each source; together 1.
        most: Rows that the mixture has at most.

    Examples:
        >>> counts([700, 90], [0.7, 0.3])
        [210, 90]
    """
    total = min(size / part for size, part in zip(sizes, parts, strict=True))
    if most is not None:
        total = min(total, most)
    # A share such as 0.7 is a little off in binary, and 7 rows of it must not become 6.
    return [min(size, int(total * part + 1e-6)) for size, part in zip(sizes, parts, strict=True)]


def draw(hashes: Sequence[int], count: int) -> list[int]:
    """Indices of the `count` rows with the lowest hashes, in the order of these: that of the file plays no part."""
    return sorted(range(len(hashes)), key=hashes.__getitem__)[:count]


def row_hash(row: Row) -> int:
    """A hash of a row's content; columns that are null might as well be missing."""
    content = {name: value for name, value in row.values.items() if value is not None}
    return stable_id(json.dumps(content, sort_keys=True, default=str))


def interleave(streams: Sequence[Iterator[T]], parts: Sequence[float], random: Random) -> Iterator[T]:
    """Rows of several streams, each from one chosen at random by its share, until the chosen one has ended."""
    while True:
        try:
            row = next(random.choices(streams, parts)[0])
        except StopIteration:
            return
        yield row


def stream_rows(sources: Sources, key: str, random: Random, columns: Columns | None = None) -> Iterator[Row]:
    """Rows as they are read: mixed by their ratios where these are given, one source after another otherwise.

    Raises:
        ValueError: As in `load_rows` and `shares`.
    """
    if not isinstance(sources, dict):
        return iterate_rows(sources, key, columns)
    parts = shares(sources, key)
    return interleave([iterate_rows(source, key, columns) for source in sources], parts, random)
