"""Layers of bitsandbytes, in 8 and 4 bits: what they need so that adapters below them learn, in little memory."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn


def keep_differentiable(model: nn.Module) -> None:
    """Let gradients pass 4-bit layers on a CPU, even after they have been used for inference.

    In evaluation mode bitsandbytes repacks such a layer at its first use without a gradient, for a kernel that has no
    backward pass; adapters below it would then get no gradient, without a word.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            cast("Any", module).support_avx512bf16_for_cpu = False


def let_inputs_go(model: nn.Module) -> None:
    """Keep of 8-bit layers nothing that only the gradient of their weights would need.

    bitsandbytes notes their inputs where autograd does not see them, so that gradient checkpointing would not let them
    go: every input of every layer of a large model.
    """

    def forget(module: nn.Module, args: object, output: Tensor) -> None:
        if hasattr(output.grad_fn, "tensors"):
            cast("Any", output.grad_fn).tensors = (None, None, None)

    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.register_forward_hook(forget)
