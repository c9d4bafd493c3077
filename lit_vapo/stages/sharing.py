"""Losses and figures that do not depend on how many processes share a batch."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_vapo.models.sharding import is_cut, local, whole
from lit_vapo.stages.strategy import sharing_of


def sum_of_all(module: LightningModule, x: Tensor) -> Tensor:
    """Sum of a tensor over all processes."""
    if module._trainer is None:
        return x
    return cast("Tensor", module.trainer.strategy.reduce(x.clone(), reduce_op="sum"))


class Sharers(NamedTuple):
    """The processes that share a batch.

    Attributes:
        size: How many there are.
        rank: Which of them this is.
    """

    size: int = 1
    rank: int = 0


def sharers(module: LightningModule) -> Sharers:
    """The processes that share a batch; those that split products see the same rows, and count as one."""
    shared = (None if module._trainer is None else module.trainer.distributed_sampler_kwargs) or {}
    return Sharers(int(shared.get("num_replicas", 1)), int(shared.get("rank", 0)))


def unsynced(module: LightningModule, last: bool) -> AbstractContextManager[None]:
    """A block for one of several backward passes before a step: processes exchange gradients in the last one alone."""
    block = getattr(module.trainer.strategy, "block_backward_sync", nullcontext)
    return nullcontext() if last else cast("AbstractContextManager[None]", block())


def average_gradients(module: LightningModule) -> None:
    """Average over processes the gradients of weights that are not cut, where a strategy cuts the others.

    Those have their averages already, and DDP averages by itself.
    """
    sharing = sharing_of(module.trainer.strategy)
    if sharing is None or sharing.data.size() == 1:
        return
    gradients = [local(p.grad) for p in module.parameters() if p.grad is not None and not is_cut(p)]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat, group=sharing.data.get_group())
    parts = (flat / sharing.data.size()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients, however they are shared, down to a norm; what it was before ()."""
    kinds: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            kinds.setdefault(mesh, []).append(parameter)
    if kinds.keys() == {None}:
        return torch.nn.utils.clip_grad_norm_(kinds[None], limit)
    # No operation takes tensors of different meshes.
    norms = [torch.nn.utils.get_total_norm([cast("Tensor", p.grad) for p in kind]) for kind in kinds.values()]
    norm = torch.linalg.vector_norm(torch.stack([whole(x) for x in norms]))
    for kind in kinds.values():
        torch.nn.utils.clip_grads_with_norm_(kind, limit, norm)
    return norm


def rows_of_all(module: LightningModule, x: Tensor) -> Tensor:
    """Rows of all processes (N·B, …), of which each has B."""
    return x if sharers(module).size == 1 else cast("Tensor", module.all_gather(x)).flatten(0, 1)


def even_share(module: LightningModule, count: Tensor) -> Tensor:
    """By what to divide a sum of losses, so that training minimises their mean over all processes.

        Σ_processes count / num_processes

    Data-parallel strategies average gradients over processes: that is the other division.

    Args:
        module: What is trained.
        count: Tokens or pairs of this process that count, (), an integer.
    """
    return sum_of_all(module, count).clamp_min(1) / sharers(module).size


def loss_of_all(module: LightningModule, loss: Tensor, batch_idx: int) -> Tensor:
    """Mean of a loss over processes: what training minimises, and what is logged.

    Raises:
        ValueError: It is not finite; all processes find that out, and none waits for the others.
    """
    found = sum_of_all(module, loss.detach()) / sharers(module).size
    if not torch.isfinite(found):
        raise ValueError(f"loss: expected a finite number, got {found.item()} in batch {batch_idx}")
    return found
