"""An order of rows in which neighbours are of similar length, and yet every epoch differs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL = 50


class LengthSampler(Sampler[int]):
    """Shuffles rows into pools of `POOL` batches, sorts each pool by length, and shuffles its batches.

    Cutting the order into batches gives little padding. It yields single rows, so Lightning can share them out
    over processes; the order depends on seed and epoch alone.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch, over all processes.
        seed: Seed of the shuffles.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Every row once."""
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
        for i in torch.randperm(len(full), generator=generator).tolist():
            yield from full[i]
        yield from rest
