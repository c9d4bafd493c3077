"""Orders of rows: another in every epoch, each a function of seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DistributedSampler

POOL = 50


class Course(Protocol):
    """How far a run has come; a resumed run stands where its checkpoint says."""

    def taken(self) -> int:
        """Batches that were trained on, in all epochs and in all runs that one checkpoint continues."""

    def limit(self, batches: float) -> float:
        """How many of an epoch's batches are trained on, where there are so many."""


class EpochSampler(DistributedSampler[Any]):
    """Rows in a random order that depends on seed and epoch alone.

    With a `course`, epoch and place in the epoch follow from the number of batches that were trained on: a resumed
    run is served what the uninterrupted run would have been, and rows served before are not even looked up. Without
    one, each pass is the next epoch.

    It shares the rows out itself: Lightning leaves a `DistributedSampler` as it is, but would shuffle any other
    sampler's order again. All processes get equally many rows. Where they do not come out even, the last few processes
    get a stand-in, which is not to be learned from: its number is `size` or more (`DealtRows`, `FeatureRows`). With
    `drop_last` such rows are left out instead.

    Args:
        size: Number of rows.
        batch_size: Rows of a batch, over all processes.
        seed: Seed of the orders.
        num_replicas: Number of processes.
        rank: Which of them this is.
        course: How far the run has come.
        drop_last: Whether the loader leaves an incomplete last batch out.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        course: Course | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__(range(size), num_replicas, rank, seed=seed, drop_last=drop_last)  # type: ignore[arg-type]
        self.size = size
        self.batch_size = batch_size
        self.course = course
        whole, rest = divmod(self.total_size, batch_size)
        self.batches = whole + bool(rest and not drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass, where there is no `course`; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of rows of this process in a whole epoch."""
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        """The rows of this process that are left of the epoch."""
        epoch, place = self._place()
        order = self.order(torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63))
        # Rows of the last batch stand in, which are of similar length.
        order += [self.size + order[-1 - i % self.size] for i in range(self.total_size - self.size)]
        order = order[: self.total_size]
        # Every batch over all processes is dealt out, so that each process gets its share of it.
        yield from order[place * self.batch_size + self.rank :: self.num_replicas]

    def _place(self) -> tuple[int, int]:
        """The epoch, and how many of its batches were served before."""
        if self.course is not None:
            return divmod(self.course.taken(), max(1, int(self.course.limit(self.batches))))
        self.epoch += 1
        return self.epoch - 1, 0

    def order(self, generator: torch.Generator) -> list[int]:
        """All rows in an order drawn from `generator`."""
        return torch.randperm(self.size, generator=generator).tolist()


class LengthSampler(EpochSampler):
    """Shuffles rows into pools of `POOL` batches, sorts each pool by length, and shuffles its batches.

    Cutting the order into batches gives little padding. The order depends on seed, epoch and the rows of a batch
    over all processes alone.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch, over all processes.
        seed: Seed of the shuffles.
        num_replicas: Number of processes.
        rank: Which of them this is.
        course: How far the run has come.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        course: Course | None = None,
    ) -> None:
        super().__init__(len(lengths), batch_size, seed, num_replicas, rank, course)
        self.lengths = list(lengths)

    def order(self, generator: torch.Generator) -> list[int]:
        """All rows, such that batches over all processes are of similar length."""
        order = super().order(generator)
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
