"""How long a run is, and how its learning rate falls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule


def linear_decay(total: int, warmup: int = 0, floor: float = 0.0) -> Callable[[int], float]:
    """Learning-rate factor by step: up over `warmup` steps, then straight down to `floor` at `total`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        left = max(0.0, (total - step) / max(1, total - warmup))
        return max(floor, min(1.0, left))

    return factor


def planned_iterations(module: LightningModule, updates: int) -> int:
    """Planned iterations of a whole run of PPO, each of so many weight updates.

    Raises:
        ValueError: The run has no end.
    """
    iterations, most = total_steps(module), module.trainer.max_steps
    # Lightning counts weight updates there, the schedule counts iterations.
    return min(iterations, -(-most // updates)) if most > 0 else iterations


def total_steps(module: LightningModule) -> int:
    """Planned batches of the whole run.

    Raises:
        ValueError: The run has no end.
    """
    trainer: Any = module.trainer
    if getattr(trainer.datamodule, "streams", False):
        # To ask would be to read, before the place of a resumed run is known; and a stream does not tell its length.
        return int(trainer.max_steps)
    total = trainer.estimated_stepping_batches
    if total == float("inf"):
        raise ValueError("trainer: expected max_epochs or max_steps, got a run without end")
    return int(total)
