"""Weights cut into parts, one for each process of a data-parallel group (FSDP2, `fully_shard` of torch).

What is large is cut: bases, policies that train whole, trunks. What is small and trained, adapters and heads, is whole
in every process, so that it can be switched, read and saved like anywhere else (`stages/sharing.py` averages its
gradients).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lit_vapo.models.pretrained import Pretrained, decoder_layers
from lit_vapo.models.tensor_parallel import split

T = TypeVar("T")
MESH, METHOD, OPEN = "sharded_over", "call_within", "is_open"


class Sharing(NamedTuple):
    """The processes that share a model.

    Attributes:
        data: Those that have a part of its weights each, and see other rows.
        tensor: Those that have a part of each matrix product, and see the same rows.
    """

    data: DeviceMesh
    tensor: DeviceMesh

    def share(self, model: nn.Module, whole: Iterable[nn.Parameter] = ()) -> None:
        """Share a model, in the same state in all processes, in place; these weights are not cut."""
        if self.tensor.size() > 1:
            split(model, self.tensor)
        if self.data.size() > 1:
            shard(model, self.data, whole)


def check_cut(base: Pretrained) -> None:
    """Refuse a base whose weights cannot be cut.

    Raises:
        ValueError: It is held in 8 bits.
    """
    if base.quantization == "8bit":
        raise ValueError(
            "model.base.quantization: expected 4bit or null under fsdp2, got 8bit, which cannot be cut: its layers "
            "keep more than their weights. Choose 4bit, or the strategy ddp, which holds the base in every process."
        )


def shard(model: nn.Module, mesh: DeviceMesh, whole: Iterable[nn.Parameter] = ()) -> None:
    """Cut the weights of a transformers model, block by block, in place; each block is put together while it runs.

    Args:
        model: The model, in the same state in all processes.
        mesh: The processes that share it.
        whole: Weights that stay whole.
    """
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": set(whole)}
    for block in decoder_layers(cast("nn.Module", model.base_model)):
        fully_shard(block, **options)
    # The head with the embeddings, to which it may be tied.
    fully_shard(model, **options)
    setattr(model, MESH, mesh)
    setattr(model, METHOD, types.MethodType(_call, model))
    register_fsdp_forward_method(model, METHOD)


def _call(model: nn.Module, function: Callable[[], Any]) -> Any:
    return function()


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are cut: all its processes then have to take the same passes."""
    return isinstance(model, FSDPModule)


def within(model: nn.Module, function: Callable[[], T]) -> T:
    """Call a function that uses parts of a model; if it is cut, embeddings and head are whole for as long.

    Args:
        model: The model whose parts are used.
        function: What to do with them. It returns tensors, or tuples and lists of them.
    """
    if not is_sharded(model) or getattr(model, OPEN, False):
        return function()
    setattr(model, OPEN, True)
    try:
        return cast("T", getattr(model, METHOD)(function))
    finally:
        setattr(model, OPEN, False)


def most_of(model: nn.Module, count: int) -> int:
    """The largest of the counts of all processes that share a model: passes that each of them has to take."""
    if not is_sharded(model):
        return count
    mesh: DeviceMesh = getattr(model, MESH)
    found = torch.tensor(count, device=mesh.device_type)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=mesh.get_group())
    return int(found)


def is_cut(x: Tensor) -> bool:
    """Whether processes that see different rows have a part of a weight each."""
    return isinstance(x, DTensor) and "data_parallel" in (x.device_mesh.mesh_dim_names or ())


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor, which is all of it if it is not cut."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """All of a tensor; every process that has a part of it must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x
