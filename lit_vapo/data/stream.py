"""Pairs of a set larger than memory: read, mixed, tokenised, shuffled and sorted by length as they come."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from lit_vapo.data.columns import LOOK, Columns
from lit_vapo.data.mixing import Sources, stream_rows
from lit_vapo.data.readers import PairReader
from lit_vapo.data.row import Row, attempt
from lit_vapo.data.sources import LeftOut
from lit_vapo.data.splits import check_preferred, prefers
from lit_vapo.data.tokenise import Truncation


class Shard(NamedTuple):
    """The part of a stream that one process reads: every `parts`-th row, from row `part` on.

    Attributes:
        part: Which part.
        parts: How many there are.
        even: All parts have equally many rows, so that processes that wait for each other end together: the last
            few rows of the stream are left out, and the row before an invalid one stands in for it and does not count.
    """

    part: int = 0
    parts: int = 1
    even: bool = False

    def take(self, rows: Iterator[Row]) -> Iterator[Row]:
        """This part of the rows."""
        mine = None
        for number, row in enumerate(rows):
            if number % self.parts == self.part:
                mine = row
            if mine is not None and (not self.even or number % self.parts == self.parts - 1):
                yield mine
                mine = None


class PairStream(IterableDataset[dict[str, Any]]):
    """Tokenised pairs in an order that depends on seed and epoch; every `batch_size` neighbours are of similar length.

    Each process (of training, and of those that prepare its batches) reads the whole stream, tokenises every n-th row
    and shuffles these in its own buffer: while the buffer is full, a random half of it is sorted by length, cut into
    batches, and the batches are served in random order.

    Args:
        sources: Files or hub names of preferences, or a mapping from them to ratios.
        key: The configuration key they were given under, for messages.
        reader: Reads a row.
        skip_invalid: Leave invalid rows out and warn of their number.
        batch_size: Rows of a batch.
        buffer: Rows of the buffer; at least two batches.
        seed: Seed of the order.
        num_replicas: Number of processes that train.
        rank: Which of them this is.
        shuffle: False serves the pairs in the order in which they are read.
        columns: Names of columns.
    """

    def __init__(
        self,
        sources: Sources,
        key: str,
        reader: PairReader,
        skip_invalid: bool = False,
        batch_size: int = 32,
        buffer: int = 10_000,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        columns: Columns | None = None,
    ) -> None:
        self.sources = sources
        self.key = key
        self.reader = reader
        self.columns = columns
        self.skip_invalid = skip_invalid
        self.batch_size = batch_size
        self.buffer = buffer
        self.seed = seed
        self.num_replicas = num_replicas
        self.rank = rank
        self.shuffle = shuffle
        # Shared with processes that prepare batches, which live on when an epoch ends.
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The pairs of this process."""
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        shard = Shard(self.rank * count + number, self.num_replicas * count, even=self.num_replicas > 1)
        random = Random(f"{self.seed}/{int(self.epoch)}/{shard.part}")
        pairs = (tokens for tokens, _ in self.pairs(shard))
        return by_length(pairs, self.batch_size, self.buffer, random) if self.shuffle else pairs

    def rows(self) -> Iterator[Row]:
        """Rows as they are read in this epoch, the same for all processes."""
        return stream_rows(self.sources, self.key, Random(f"{self.seed}/{int(self.epoch)}"), self.columns)

    def pairs(self, shard: Shard | None = None) -> Iterator[tuple[dict[str, Any], Truncation]]:
        """Pairs as they are read, and what was cut off them.

        Raises:
            ValueError: A row is invalid and `skip_invalid` is off, there is no valid row, or of a whole stream more
                than half of the first are of no use.
        """
        whole = shard is None
        shard = shard or Shard()
        last: tuple[dict[str, Any], Truncation] | None = None
        left_out = LeftOut(self.key, self.skip_invalid)
        owed = total = 0
        for total, row in enumerate(shard.take(self.rows()), 1):
            try:
                pair = attempt(self.reader.read, row)
            except ValueError as error:
                left_out.add(error)
                if left_out.counts.total() == 1:
                    warnings.warn(f"{self.key}: rows are left out; the first: {error}", stacklevel=2)
                owed += shard.even
            else:
                last = pair
                yield pair
            while owed and last is not None:
                owed -= 1
                yield {**last[0], "counts": False}, last[1]
            if whole and total == LOOK:
                left_out.refuse(total)
        if last is None or (whole and total < LOOK):
            left_out.refuse(total)
        left_out.warn(total)

    def look(self) -> str | None:
        """Read the first pairs, so that mistakes come before a model is loaded.

        Returns:
            What of them was cut, in words; None if nothing was.

        Raises:
            ValueError: As in `pairs`, or all pairs are ties or have weight 0.
        """
        cuts: list[Truncation] = []
        preferred = False
        for tokens, cut in self.pairs():
            preferred = preferred or prefers(tokens)
            if len(cuts) < LOOK:
                cuts.append(cut)
            elif preferred:
                break
        check_preferred(preferred, self.key)
        return self.reader.truncation(cuts, f"{self.key} (the first {len(cuts)})")


def by_length(rows: Iterator[dict[str, Any]], batch_size: int, buffer: int, random: Random) -> Iterator[dict[str, Any]]:
    """Rows shuffled through a buffer, such that every `batch_size` neighbours are of similar length."""
    held: list[dict[str, Any]] = []
    for row in rows:
        held.append(row)
        if len(held) == buffer:
            random.shuffle(held)
            size = buffer // 2 // batch_size * batch_size
            yield from _batches(held[:size], batch_size, random)
            held = held[size:]
    random.shuffle(held)
    # A short batch stays last, or the cuts would no longer fall between batches.
    size = len(held) // batch_size * batch_size
    yield from _batches(held[:size], batch_size, random)
    yield from held[size:]


def _batches(rows: list[dict[str, Any]], batch_size: int, random: Random) -> Iterator[dict[str, Any]]:
    rows = sorted(rows, key=lambda row: max(len(row["chosen_ids"]), len(row["rejected_ids"])))
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    random.shuffle(batches)
    for batch in batches:
        yield from batch
