"""Models from their configuration alone, on the meta device: shapes and data types, and no weights.

`lit-vapo plan` builds the networks of a run so, by the code that builds them in the run. Nothing but `config.json` is
read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

# Blocks that a model is built with; 0 for all that it has. Unset where models are read with their weights.
_depth: ContextVar[int | None] = ContextVar("depth", default=None)
# Weights that share one scale in nf4.
BLOCK = 64


@contextmanager
def weightless(depth: int = 0) -> Iterator[None]:
    """A block in which models are made of their configurations alone, on the meta device.

    Args:
        depth: Only this many of a model's first blocks; 0 for all.
    """
    token = _depth.set(depth)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            # What little is read of a folder's heads has no place to go to.
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
            yield
    finally:
        _depth.reset(token)


def is_weightless() -> bool:
    """Whether models are being made without weights."""
    return _depth.get() is not None


def reader(kind: Any) -> Callable[..., PreTrainedModel]:
    """What makes models of an auto class: its `from_pretrained`, or within `weightless` the same without weights."""
    return cast(
        "Callable[..., PreTrainedModel]", partial(_from_config, kind) if is_weightless() else kind.from_pretrained
    )


def _from_config(kind: Any, path: str, **kwargs: Any) -> PreTrainedModel:
    """A model on the meta device that holds what `from_pretrained` with these arguments would hold."""
    dtype, quantization = kwargs["dtype"], kwargs.get("quantization_config")
    trusted = kwargs["trust_remote_code"]
    config = AutoConfig.from_pretrained(path, revision=kwargs["revision"], trust_remote_code=trusted)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    shorten(config, _depth.get() or 0)
    # Other kernels, which need not be there, hold as much as this one.
    model = kind.from_config(config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=trusted)
    if quantization is not None:
        _quantise(model, quantization)
    return cast("PreTrainedModel", model.eval())


def shorten(config: Any, depth: int) -> None:
    """Leave a configuration the first `depth` of its blocks; all if that is 0."""
    if not depth:
        return
    config.num_hidden_layers = min(depth, config.num_hidden_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    if getattr(config, "max_window_layers", None):
        config.max_window_layers = min(config.max_window_layers, config.num_hidden_layers)


# Quantised layers: those of bitsandbytes, which adapters know, with weights as they are once they are quantised.


def _quantise(model: Any, config: Any) -> None:
    """Put quantised layers in place of linear ones, where transformers does."""
    # Here, since bitsandbytes takes seconds to import, and few models are quantised.
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    replace_with_bnb_linear(model, get_keys_to_not_convert(model), config)
    eight = bool(config.load_in_8bit)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit, model.is_quantized = eight, not eight, True
    for module in model.modules():
        if type(module).__name__ in ("Linear8bitLt", "Linear4bit"):
            module.weight.requires_grad_(False)
            module.planned_bits = 8 if eight else 4


def quantised_weight(module: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]] | None:
    """Shape and data type of what a quantised layer holds, `None` for another module.

    8 bit: a byte a weight and a float32 scale a row. 4 bit (nf4): half a byte a weight and a float32 scale for each 64.
    """
    bits = getattr(module, "planned_bits", 0)
    if not bits:
        return None
    linear = cast("nn.Linear", module)
    out, count = linear.out_features, linear.out_features * linear.in_features
    if bits == 8:
        return {"weight": ((out, linear.in_features), torch.int8), "scale": ((out,), torch.float32)}
    return {"weight": ((count // 2, 1), torch.uint8), "scale": ((-(-count // BLOCK),), torch.float32)}


def quantised_forward(module: nn.Module, on_cpu: bool) -> Callable[[Tensor], Tensor]:
    """The forward pass of a quantised layer as far as memory goes: what it makes, keeps and lets go."""
    linear = cast("nn.Linear", module)
    shape = (linear.out_features, linear.in_features)
    eight = getattr(module, "planned_bits", 0) == 8

    def forward(x: Tensor) -> Tensor:
        compute = x.dtype if eight else (getattr(module, "compute_dtype", None) or x.dtype)
        out: Tensor = _Quantised.apply(x.to(compute), linear.weight, linear.bias, shape, eight, on_cpu)
        return out.to(x.dtype)

    return forward


class _Quantised(torch.autograd.Function):
    """y = x·Wᵀ + b with quantised W; nothing is kept for the way back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, int], eight: bool, on_cpu: bool
    ) -> Tensor:
        """Multiply; of what is made on the way only the output stays."""
        ctx.shape, ctx.dtype = shape, x.dtype
        rows = x.reshape(-1, shape[1])
        if eight:
            half = rows.to(torch.float16)
            whole = torch.round(half * half.new_empty(len(half), 1, dtype=torch.float32)) if on_cpu else half
            out = _int8_product(whole.to(torch.int8), weight, x.dtype, on_cpu)
        else:
            out = rows @ weight.new_empty(shape, dtype=x.dtype).T
        if bias is not None:
            out = out + bias.to(out.dtype)
        return out.reshape(*x.shape[:-1], shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the input, through weights that are widened for it."""
        wide = grad.new_empty(ctx.shape, dtype=ctx.dtype)
        return (grad.to(ctx.dtype) @ wide, None, None, None, None, None)


def _int8_product(x: Tensor, weight: Tensor, dtype: torch.dtype, on_cpu: bool) -> Tensor:
    """Rows times weights in int32, then scaled by both scales; a CPU does that in float32 and step by step."""
    product = torch._int_mm(x, weight.T)
    if not on_cpu:
        return product.to(dtype)
    scales = product.new_empty(product.shape, dtype=torch.float32)
    return (product * scales * 0.5).to(dtype)
