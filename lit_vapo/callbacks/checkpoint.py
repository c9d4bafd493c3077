"""Checkpoints of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

PARTIAL = ".{}.partial"


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its destination and moves it there when it is complete.

    Lightning's own goes through the folder for temporary files: one that is small ends the run, and from another file
    system the last step is a copy that a full disk or a kill tears.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save, whole or not at all; the checkpoint that was there before stays until then."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(PARTIAL.format(target.name))
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except OSError as error:
            # A write that fails does not say where.
            raise OSError(error.errno, error.strerror, str(target)) from error
        finally:
            partial.unlink(missing_ok=True)


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose `last.ckpt` really is the last, and whose files are whole.

    With a validation interval Lightning saves at validations only, and what was trained after the last of them would
    be in no file.

    Attributes:
        trained: Whether a batch was trained on.
    """

    trained = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write whole files, and clear away what a killed process left of one."""
        super().setup(trainer, pl_module, stage)
        # A strategy that writes a part for each process has a way of its own.
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
        if stage == "fit" and trainer.is_global_zero and self.dirpath is not None:
            for path in Path(self.dirpath).glob(PARTIAL.format("*")):
                path.unlink()

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Take notice that something was learned."""
        self.trained = True
        super().on_train_batch_end(trainer, *args, **kwargs)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of training."""
        super().on_train_end(trainer, pl_module)
        if self.save_last and self.dirpath is not None and not getattr(trainer, "fast_dev_run", False):
            trainer.save_checkpoint(Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}.ckpt", self.save_weights_only)


class BestCheckpoint(ModelCheckpoint):
    """Keeps `best.ckpt`, the checkpoint whose validation was best; without validation it is the latest.

    Args:
        dirpath: Folder of the run's checkpoints.
        monitor: What was validated; smaller is better.
    """

    def __init__(self, dirpath: str, monitor: str) -> None:
        super().__init__(dirpath, filename="best", monitor=monitor, mode="min", enable_version_counter=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Monitor nothing where nothing is validated."""
        super().on_train_start(trainer, pl_module)
        batches = trainer.num_val_batches
        if sum(batches if isinstance(batches, list) else [batches]) == 0:
            self.monitor = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save nothing of a run that is over before its first validation."""
        if self.monitor is None or self.monitor in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of a run that was too short for a validation."""
        super().on_train_end(trainer, pl_module)
        if not self.best_model_path and self.dirpath is not None and not getattr(trainer, "fast_dev_run", False):
            trainer.save_checkpoint(Path(self.dirpath) / "best.ckpt", self.save_weights_only)
