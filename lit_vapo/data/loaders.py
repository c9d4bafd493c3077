"""Loaders: batches of what the splits hold, or of a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader

from lit_vapo.data.held import TextSplits
from lit_vapo.data.sampler import LengthSampler
from lit_vapo.data.splits import Rows
from lit_vapo.data.stream import StreamLoader


class TextLoaders(TextSplits):
    """Loaders of batches; Lightning sets the trainer."""

    num_workers: int
    trainer: Any

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    def _loader(self, rows: Any, collate: Callable[..., Any], **kwargs: Any) -> DataLoader[Any]:
        return DataLoader(
            rows,
            batch_size=self.batch_size,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            **kwargs,
        )

    def _pair_loader(self, rows: Rows, collate: Callable[..., Any], train: bool) -> DataLoader[Any]:
        if not train:
            return self._loader(rows, collate)
        ranks = self._ranks()
        batch_size = self.batch_size * ranks.get("num_replicas", 1)
        lengths = [max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
        return self._loader(rows, collate, sampler=LengthSampler(lengths, batch_size, self.seed, **ranks))

    def _training_pairs(self, collate: Callable[..., Any]) -> DataLoader[Any]:
        if not self.streams:
            return self._pair_loader(self.preference_rows("train"), collate, train=True)
        if self.trainer is not None and self.trainer.max_steps < 0:
            # Learning rates decay to the end of the run, which a stream does not tell.
            raise ValueError("trainer.max_steps: expected the steps of a run on data that streams, got -1")
        return StreamLoader(
            self.stream(**self._ranks()),
            lambda: self.trainer.current_epoch if self.trainer is not None else None,
            batch_size=self.batch_size,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _ranks(self) -> dict[str, Any]:
        return (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}

    def _prepare_preferences(self) -> None:
        """Read and check what is held, and the beginning of what streams."""
        self.preference_rows("val")
        cut = self.stream().look() if self.streams else None
        if cut is not None:
            self.warn(cut)
