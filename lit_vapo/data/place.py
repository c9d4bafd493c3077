"""Loaders of training batches that know their place, so that a resumed run goes on where it stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from lit_vapo.data.sampler import Course
    from lit_vapo.data.stream import PairStream


class TrainerCourse:
    """How far a Lightning trainer has come, as in `Course`.

    Args:
        trainer: The trainer. It keeps the count in its checkpoints.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def taken(self) -> int:
        """Batches that were trained on, in all epochs and in all runs that one checkpoint continues."""
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.total.processed)

    def limit(self, batches: float) -> float:
        """How many of an epoch's batches are trained on: `limit_train_batches` may leave some out."""
        limit = self.trainer.limit_train_batches
        return min(batches, limit) if isinstance(limit, int) else batches * limit


class RowLoader(DataLoader[Any]):
    """Batches of rows that are held, in the order of an `EpochSampler`, which finds its place by itself."""

    def __iter__(self) -> Any:
        """The batches that are left of an epoch."""
        # Begun when the first batch is asked for: Lightning makes an iterator before it reads the checkpoint, and
        # processes that prepare batches would begin at once.
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing; Lightning takes loaders that have this for ones that can be resumed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class StreamLoader(DataLoader[Any]):
    """Batches of a stream, whose number is unknown before its end; it tells the stream the epoch.

    A resumed run finds its place by reading the batches of its epoch that were served before once more, and leaving
    them out.

    Args:
        dataset: The stream.
        course: How far the run has come; None without a trainer, and then each pass is the next epoch.
        **options: Those of `DataLoader`.
    """

    def __init__(self, dataset: PairStream, course: Course | None, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.stream = dataset
        self.course = course
        # The pass under way: its epoch, the batches taken before it began, and how many it has, once it has ended.
        self.epoch, self.began, self.length = 0, 0, math.inf

    def __iter__(self) -> Any:
        """The batches that are left of an epoch."""
        if self.course is None:
            self.epoch += 1
            yield from self._batches(self.epoch - 1)
            return
        served = False
        while not served and self.length:
            place, end = self.course.taken() - self.began, self.course.limit(self.length)
            if place >= end:
                self.epoch, self.began, self.length = self.epoch + 1, self.began + int(end), math.inf
                continue
            number = 0
            for number, batch in enumerate(self._batches(self.epoch), start=1):
                if number > place:
                    served = True
                    yield batch
            self.length = number

    def _batches(self, epoch: int) -> Iterator[Any]:
        self.stream.set_epoch(epoch)
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Where the pass under way began."""
        return {"epoch": self.epoch, "began": self.began, "length": self.length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the pass of a checkpoint; without one the place is looked for from the first epoch on."""
        if state:
            self.epoch, self.began, self.length = state["epoch"], state["began"], state["length"]
