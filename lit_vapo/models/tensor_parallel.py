"""Matrix products of a model split over processes (tensor parallelism, 1909.08053), by the plan of its architecture."""

from __future__ import annotations

import re
from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

KEY = "trainer.strategy.tensor_parallel_size"
STYLES: dict[str, Any] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
# What sees the heads of this process alone, and so a part of its gradient.
PARTIAL = "replicated_with_grad_allreduce"


def check_split(config: Any, size: int, trains_all: bool) -> None:
    """Refuse a model that cannot be split.

    Args:
        config: The model's configuration.
        size: Processes that share each matrix product.
        trains_all: Whether all its weights are trained.

    Raises:
        ValueError: Its architecture has no plan of how to split it, or another number of heads.
    """
    text = config.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None) or {}
    unknown = sorted(set(plan.values()) - {*STYLES, PARTIAL})
    if not plan or unknown:
        found = f"one with {unknown}" if unknown else "none"
        raise ValueError(
            f"{KEY}: expected 1 for {text.model_type}, got {size}: a plan of layers to split by column and by row is "
            f"needed, and transformers has {found}. Share whole weights instead (data_parallel_size)."
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, name, None)
        if heads is not None and heads % size:
            raise ValueError(
                f"{KEY}: expected a number that divides the {heads} {name} of {text.model_type}, got {size}"
            )
    if trains_all and PARTIAL in plan.values():
        raise ValueError(
            f"{KEY}: expected 1 where all weights of {text.model_type} are trained, got {size}: its norms of single "
            "heads would get a part of their gradient each. Train adapters (model.lora), or share whole weights."
        )


def split(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split the matrix products of a transformers model, adapters included, in place; embeddings and head stay whole.

    A layer split by columns gives each process some of its outputs; so does an adapter's second matrix there, and its
    first one is whole. A layer split by rows takes some of the inputs, and so does an adapter's first matrix.

    Args:
        model: The model, in the same state in all processes; `check_split` was asked.
        mesh: The processes that share each product.
    """
    backbone = cast("nn.Module", model.base_model)
    plan = cast("Any", backbone).config.base_model_tp_plan
    patterns = [(re.compile(name.replace(".", r"\.").replace("*", r"\d+")), style) for name, style in plan.items()]
    found = [
        (module, style)
        for name, module in backbone.named_modules()
        for pattern, style in patterns
        if pattern.fullmatch(name) and style in STYLES
    ]
    for module, style in found:
        parallelize_module(cast("nn.Module", getattr(module, "base_layer", module)), mesh, STYLES[style]())
        for adapter in getattr(module, "lora_B" if style == "colwise" else "lora_A", {}).values():
            parallelize_module(adapter, mesh, STYLES[style]())
