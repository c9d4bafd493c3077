"""What a run is about, before it begins, and what came of it, once it has ended."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_vapo.callbacks.checkpoint import RunCheckpoint
from lit_vapo.callbacks.checkpoint_files import BEST, LAST
from lit_vapo.progress import clock

# The figures that people ask for first, as far as a run has them.
FIGURES = (
    "val/reward_gain",
    "val/gold_gain",
    "val/win_rate",
    "val/kl_k3",
    "train/kl_k3",
    "train/ensemble_sigma",
    "val/accuracy",
    "val/nll",
    "val/ece",
    "val/loss",
)


class RunSummary(Callback):
    """Prints a few lines before training, and a short table after it.

    Args:
        folder: The run's.
        checkpoint: What keeps its checkpoints.
    """

    def __init__(self, folder: str, checkpoint: RunCheckpoint) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.started = time.monotonic()

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Say what will happen, before anything is loaded."""
        if stage == "fit" and trainer.is_global_zero:
            self.started = time.monotonic()
            until = [f"max_steps={trainer.max_steps}"] if trainer.max_steps > 0 else []
            until += [f"max_epochs={trainer.max_epochs}"] if (trainer.max_epochs or -1) > 0 else []
            where = f"{trainer.strategy.root_device.type}, {trainer.world_size} process"
            sample = getattr(trainer.datamodule, "sample", None)  # type: ignore[attr-defined]
            lines = {
                **pl_module.about(),
                **({} if sample is None else {"data": f"a sample of at most {sample} rows (data.sample)"}),
                "device": where + ("es" if trainer.world_size > 1 else "") + f", {trainer.precision}",
                "run": f"{self.folder}, until {' or '.join(until) or 'it is stopped'}",
            }
            _print(lines)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what came of it, and what to do next."""
        if not trainer.is_global_zero:
            return
        found = {name: f"{float(x):.3g}" for name in FIGURES if (x := trainer.callback_metrics.get(name)) is not None}
        kept = [path for name in (BEST, LAST) if (path := self.checkpoint.folder / name).exists()]
        lines = {"ended": f"after {clock(time.monotonic() - self.started)}", **found}
        if kept:
            export = f"lit-vapo export --checkpoint {kept[0]} --output FOLDER"
            lines |= {"checkpoint": str(kept[-1]), "next": export}
        _print(lines)


def _print(lines: dict[str, str]) -> None:
    width = max(map(len, lines))
    print("\n".join(f"{name:{width}}  {value}" for name, value in lines.items()), flush=True)
