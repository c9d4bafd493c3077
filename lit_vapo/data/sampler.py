"""An order of rows in which neighbours are of similar length, and yet every epoch differs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DistributedSampler

POOL = 50


class LengthSampler(DistributedSampler[Any]):
    """Shuffles rows into pools of `POOL` batches, sorts each pool by length, and shuffles its batches.

    Cutting the order into batches gives little padding. The order depends on seed, epoch and the rows of a batch
    over all processes alone. It shares the rows out itself: Lightning leaves a `DistributedSampler` as it is, but would
    shuffle any other sampler's order again, and the lengths with it. All processes get equally many rows; where they do
    not come out even, up to `num_replicas - 1` rows come twice.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch, over all processes.
        seed: Seed of the shuffles.
        num_replicas: Number of processes.
        rank: Which of them this is.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int = 0, num_replicas: int = 1, rank: int = 0
    ) -> None:
        self.lengths = list(lengths)
        super().__init__(self.lengths, num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        self.batch_size = batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of rows of this process."""
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        """The rows of this process."""
        order = self._order()
        order += order[: self.total_size - len(order)]
        # Every batch over all processes is dealt out, so that each process gets its share of it.
        yield from order[self.rank :: self.num_replicas]

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        self.epoch += 1
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        batches: list[list[int]] = []
        size = self.batch_size * POOL
        for start in range(0, len(order), size):
            pool = sorted(order[start : start + size], key=lambda row: self.lengths[row])
            batches += [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
        # A short batch stays last, or the cuts would no longer fall between batches.
        full = [batch for batch in batches if len(batch) == self.batch_size]
        rest = [row for batch in batches if len(batch) < self.batch_size for row in batch]
        order = []
        for i in torch.randperm(len(full), generator=generator).tolist():
            order += full[i]
        return order + rest
