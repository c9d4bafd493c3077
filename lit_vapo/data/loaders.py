"""Loaders: batches of what the splits hold, or of a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from lit_vapo.data.place import RowLoader, StreamLoader, TrainerCourse
from lit_vapo.data.sampler import EpochSampler, LengthSampler
from lit_vapo.data.splits import DealtRows, FeatureRows
from lit_vapo.data.text_splits import TextSplits


class TextLoaders(TextSplits):
    """Loaders of batches; Lightning sets the trainer."""

    num_workers: int
    trainer: Any

    @property
    def _world_size(self) -> int:
        return int(self._ranks().get("num_replicas", 1))

    def _options(self, collate: Callable[..., Any]) -> dict[str, Any]:
        workers = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        # Numbers of its own: how often a loader is begun must not show in what the run draws.
        generator = torch.Generator().manual_seed(self.order_seed % 2**63)
        return {"batch_size": self.batch_size, "collate_fn": collate, "generator": generator, **workers}

    def _held_out(self, rows: Any, collate: Callable[..., Any]) -> DataLoader[Any]:
        """Rows in their order."""
        return DataLoader(rows, **self._options(collate))

    def _shuffled(self, rows: Any, collate: Callable[..., Any], drop_last: bool = False) -> DataLoader[Any]:
        """Rows in another order in every epoch."""
        sampler = EpochSampler(len(rows), drop_last=drop_last, **self._order())
        return RowLoader(
            rows if isinstance(rows, FeatureRows) else DealtRows(rows),
            sampler=sampler,
            drop_last=drop_last,
            **self._options(collate),
        )

    def _training_pairs(self, collate: Callable[..., Any]) -> DataLoader[Any]:
        """Pairs batched by length."""
        if not self.streams:
            rows = self.preference_rows("train")
            lengths = [max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
            sampler = LengthSampler(lengths, **self._order())
            return RowLoader(DealtRows(rows), sampler=sampler, **self._options(collate))
        if self.trainer is not None and self.trainer.max_steps < 0:
            # Learning rates decay to the end of the run, which a stream does not tell.
            raise ValueError("trainer.max_steps: expected the steps of a run on data that streams, got -1")
        return StreamLoader(self.stream(**self._ranks()), self._course(), **self._options(collate))

    def _order(self) -> dict[str, Any]:
        """What an order depends on, besides the rows."""
        ranks = self._ranks()
        together = self.batch_size * ranks.get("num_replicas", 1)
        return {"batch_size": together, "seed": self.order_seed, "course": self._course(), **ranks}

    def _course(self) -> TrainerCourse | None:
        return TrainerCourse(self.trainer) if self.trainer is not None else None

    def _ranks(self) -> dict[str, Any]:
        return (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}

    def _prepare_preferences(self) -> None:
        """Read and check what is held, and the beginning of what streams."""
        self.preference_rows("val")
        cut = self.stream().look() if self.streams else None
        if cut is not None:
            self.warn(cut)
