"""Checkpoints of a run."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose `last.ckpt` really is the last.

    With a validation interval Lightning saves at validations only, and what was trained after the last of them would
    be in no file.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of training."""
        super().on_train_end(trainer, pl_module)
        if self.save_last and self.dirpath is not None and not getattr(trainer, "fast_dev_run", False):
            trainer.save_checkpoint(Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}.ckpt", self.save_weights_only)
