"""Strategies: which of Lightning's train rightly here, and weights sharded over processes (FSDP2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lit_vapo.models.sharding import Sharing, whole


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for models that shard themselves, with checkpoints like those of any other strategy.

    Weights are sharded where a stage builds them (`models/sharding.py`). A checkpoint is one file, put together in the
    first process, that holds what was trained and nothing else. It can be resumed with another strategy or number of
    processes, and is exported and read like any other.

    Args:
        data_parallel_size: Processes that have a part of the weights and a share of a batch each; `auto` for all there
            are, divided by the next.
        tensor_parallel_size: Processes that see the same rows and have a part of each matrix product; within a machine.
        process_group_backend: Of torch; `null` takes what suits the device.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(data_parallel_size, tensor_parallel_size, False, process_group_backend)

    def setup_environment(self) -> None:
        """Count the processes."""
        processes, size = self.num_nodes * self.num_processes, cast("int", self._tensor_parallel_size)
        if self._data_parallel_size == "auto":
            self._data_parallel_size = processes // size
        if self._data_parallel_size * size != processes:
            raise ValueError(
                f"trainer.strategy: expected data_parallel_size × tensor_parallel_size to be the {processes} processes "
                f"(trainer.num_nodes × trainer.devices), got {self._data_parallel_size} × {size}"
            )
        super().setup_environment()

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Over the processes that see different rows."""
        return super().reduce(tensor, group or self.sharing.data.get_group(), reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """From the processes that see different rows."""
        return super().all_gather(tensor, group or self.sharing.data.get_group(), sync_grads)

    @property
    def sharing(self) -> Sharing:
        """The processes that share the models."""
        return Sharing(self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"])

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are sharded as soon as they are built, so that they can be loaded when those of others are."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimisers are Lightning's to restore, as elsewhere."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What the module keeps of its state, in the first process; nothing in the others."""
        module = cast("Any", self.lightning_module)
        kept = module.kept_keys()
        # Of what is not kept nothing is put together: a frozen base may be larger than one machine holds.
        return self._gathered({name: x for name, x in module.state_dict().items() if name in kept})

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimiser, in the first process; nothing in the others."""
        return self._gathered(cast("Any", super(ModelParallelStrategy, self).optimizer_state(optimizer)))

    def _gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        def gather(x: Any) -> Any:
            full = whole(x) if isinstance(x, Tensor) else x
            if not self.is_global_zero:
                return None
            return full.cpu() if isinstance(full, Tensor) else full

        found = cast("dict[str, Any]", tree_map(gather, state))
        return found if self.is_global_zero else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write one file, like a strategy that shards nothing."""
        super(ModelParallelStrategy, self).save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one file, like a strategy that shards nothing."""
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path, weights_only)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give each weight that a checkpoint holds to those who have a part of it."""
        own = cast("Any", self.lightning_module).state_dict()
        for name, value in checkpoint["state_dict"].items():
            if name in own and isinstance(value, Tensor):
                own[name].copy_(_like(own[name], value))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each moment to those who have a part of its weight."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [i for group in saved["param_groups"] for i in group["params"]]
            of = dict(zip(numbers, parameters, strict=True))
            state = {i: {k: _like(of[i], x) for k, x in moments.items()} for i, moments in saved["state"].items()}
            optimizer.load_state_dict({**saved, "state": state})


def _like(target: Tensor, value: Any) -> Any:
    """A tensor sharded as another of its shape is; anything else as it is."""
    if not isinstance(target, DTensor) or isinstance(value, DTensor) or not isinstance(value, Tensor):
        return value
    if value.shape != target.shape:
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def check_strategy(strategy: Strategy) -> Strategy:
    """A strategy, unless processes would train apart under it, or it shards what is not made for it.

    Raises:
        ValueError: It is none of those that were tested.
    """
    if type(strategy) is ModelParallelStrategy:
        raise ValueError(
            "trainer.strategy: expected `fsdp2` to shard weights (configs/trainer/fsdp2.yaml), got Lightning's "
            "ModelParallelStrategy, whose checkpoints would hold all of a frozen base"
        )
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ShardedStrategy)):
        raise ValueError(
            "trainer.strategy: expected one device, `ddp`, or `fsdp2` to shard weights, got "
            f"{type(strategy).__name__}, with which several backward passes to a step would go wrong without a word"
        )
    return strategy


def sharing_of(strategy: Strategy) -> Sharing | None:
    """The processes that share models, if any do."""
    return strategy.sharing if isinstance(strategy, ShardedStrategy) else None


StrategyRegistry.register("fsdp2", ShardedStrategy, description="Weights sharded over all processes (FSDP2)")
