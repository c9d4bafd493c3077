"""Losses and figures that do not depend on how many processes share a batch."""

from __future__ import annotations

from typing import cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor


def sum_of_all(module: LightningModule, x: Tensor) -> Tensor:
    """Sum of a tensor over all processes."""
    if module._trainer is None:
        return x
    return cast("Tensor", module.trainer.strategy.reduce(x.clone(), reduce_op="sum"))


def rows_of_all(module: LightningModule, x: Tensor) -> Tensor:
    """Rows of all processes (N·B, …), of which each has B."""
    return x if module.trainer.world_size == 1 else cast("Tensor", module.all_gather(x)).flatten(0, 1)


def even_share(module: LightningModule, count: Tensor) -> Tensor:
    """By what to divide a sum of losses, so that training minimises their mean over all processes.

        Σ_processes count / num_processes

    Data-parallel strategies average gradients over processes: that is the other division.

    Args:
        module: What is trained.
        count: Tokens or pairs of this process that count, (), an integer.
    """
    processes = 1 if module._trainer is None else module.trainer.world_size
    return sum_of_all(module, count).clamp_min(1) / processes


def loss_of_all(module: LightningModule, loss: Tensor, batch_idx: int) -> Tensor:
    """Mean of a loss over processes: what training minimises, and what is logged.

    Raises:
        ValueError: It is not finite; all processes find that out, and none waits for the others.
    """
    processes = 1 if module._trainer is None else module.trainer.world_size
    found = sum_of_all(module, loss.detach()) / processes
    if not torch.isfinite(found):
        raise ValueError(f"loss: expected a finite number, got {found.item()} in batch {batch_idx}")
    return found
