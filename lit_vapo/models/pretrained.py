"""Loading pretrained models: data type, 8-bit and 4-bit weights, LoRA adapters, in one place.

Nothing here runs code from a model's folder unless `trust_remote_code` is set, and weights are read from
safetensors only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_vapo.folders import absolute
from lit_vapo.models.quantised import let_inputs_go
from lit_vapo.models.weightless import is_weightless, reader, shorten
from lit_vapo.models.weights import check_model, loading
from lit_vapo.ranges import PositiveFloat, PositiveInt, check_ranges

# The option that names a model, where who loads it says nothing else.
KEY = "model.base.path"
RECOMPUTES = "recomputes_blocks"


@dataclass
class Pretrained:
    """Where a pretrained model comes from and how it is held in memory.

    Args:
        path: Folder or hub name of a whole transformers model; an adapter is merged first.
        dtype: Data type of the weights; `auto` takes the one they are stored in, or float32 on a processor that is
            slow in half precision (`halves_are_slow`). Weights that are trained are held in float32, adapters included.
        quantization: `8bit` (LLM.int8) or `4bit` (nf4) weights through bitsandbytes; `null` for none. A quantised
            base is frozen: train adapters or heads on it.
        attn_implementation: Attention kernel, such as `sdpa` or `flash_attention_2`; `null` lets transformers choose.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run Python code that comes with the model. Leave it off for models you do not trust.
        gradient_checkpointing: Where weights are trained, keep of each block what goes into it alone, and compute the
            rest again on the way back: a small part of the memory for activations, for one more forward pass.
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["8bit", "4bit"] | None = None
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        """Know a folder by its absolute path, so that what is trained on it loads from elsewhere."""
        self.path = absolute(self.path)


@dataclass
class Lora:
    """Low-rank adapters (2106.09685), trained in place of the base's own weights.

    Args:
        rank: Rank r of the update.
        alpha: The update is scaled by alpha / rank.
        target_modules: Names of the linear layers to adapt, or `all-linear`.
        top_layers: Adapt only this many of the topmost layers; `null` adapts all. Backpropagation stops below
            them, so the cost of a training step falls in proportion. PPO computes what lies below once an iteration.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    target_modules: str | list[str] = "all-linear"
    top_layers: int | None = None

    def __post_init__(self) -> None:
        """Refuse adapters that would do nothing.

        Raises:
            ValueError: A number is out of its range, or no layer is named.
        """
        check_ranges(Lora, vars(self), "model.lora.")
        if not self.target_modules:
            raise ValueError("model.lora.target_modules: expected names of layers or `all-linear`, got none")


def halves_are_slow() -> bool:
    """Whether models run on a processor that has no instructions for half precision: AVX2 takes ten times as long."""
    fast = torch.accelerator.is_available() or torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "SVE"))
    return not fast


def _dtype(spec: Pretrained) -> torch.dtype | Literal["auto"]:
    if spec.dtype != "auto":
        return cast("torch.dtype", getattr(torch, spec.dtype))
    # Without weights, a model is being planned for a GPU.
    return torch.float32 if spec.quantization is None and not is_weightless() and halves_are_slow() else "auto"


def load_kwargs(spec: Pretrained) -> dict[str, Any]:
    """How a model of `spec` is read: arguments of `from_pretrained`."""
    kwargs: dict[str, Any] = {
        "dtype": _dtype(spec),
        "revision": spec.revision or "main",
        "trust_remote_code": spec.trust_remote_code,
        "use_safetensors": True,
    }
    if spec.attn_implementation is not None:
        kwargs["attn_implementation"] = spec.attn_implementation
    if spec.quantization is not None:
        compute = torch.bfloat16 if spec.dtype == "auto" else getattr(torch, spec.dtype)
        kwargs["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if spec.quantization == "8bit"
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
        )
        # bitsandbytes quantises where the weights land, so they must land on this process's own device.
        kwargs["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    return kwargs


@contextmanager
def _read(spec: Pretrained, key: str) -> Iterator[None]:
    """A block that reads a model which is whole, and names it where that fails."""
    if not is_weightless():
        check_model(spec.path, key, spec.revision)
    with loading(spec.path, key):
        yield


def load_causal_lm(spec: Pretrained, key: str = KEY) -> PreTrainedModel:
    """The language model of `spec`, in evaluation mode.

    Args:
        spec: The model.
        key: The option that names it, for the message.

    Raises:
        ValueError: There is no such model.
    """
    with _read(spec, key):
        lm = cast("PreTrainedModel", reader(AutoModelForCausalLM)(spec.path, **load_kwargs(spec)))
    return _marked(lm, spec)


def load_backbone(spec: Pretrained, num_layers: int | None = None, key: str = KEY) -> PreTrainedModel:
    """The model of `spec` without its language-model head, cut off after `num_layers` blocks.

    Args:
        spec: The model.
        num_layers: How many blocks stay.
        key: The option that names it, for the message.

    Raises:
        ValueError: There is no such model, or it has fewer than `num_layers` blocks.
    """
    with _read(spec, key), warnings.catch_warnings():
        # The unused head's weights are meant to stay unread.
        warnings.filterwarnings("ignore", message=".*were not used when initializing.*")
        backbone = cast("PreTrainedModel", reader(AutoModel)(spec.path, **load_kwargs(spec)))
    if num_layers is not None:
        layers = decoder_layers(backbone)
        if not 1 <= num_layers <= len(layers):
            raise ValueError(f"layer: expected 1 … {len(layers)} for {spec.path!r}, got {num_layers}")
        cut_off(backbone, num_layers)
    return _marked(backbone, spec)


def _marked(model: PreTrainedModel, spec: Pretrained) -> PreTrainedModel:
    """A model whose backbone knows whether its blocks are to be computed again."""
    setattr(model.base_model, RECOMPUTES, spec.gradient_checkpointing)
    if spec.quantization == "8bit" and not is_weightless():
        let_inputs_go(model)
    return model


def recomputes_blocks(backbone: nn.Module) -> bool:
    """Whether a backbone was loaded to compute its blocks again on the way back (`gradient_checkpointing`)."""
    return bool(getattr(backbone, RECOMPUTES, False))


def cut_off(backbone: PreTrainedModel, num_layers: int) -> None:
    """Drop all blocks of a backbone after the first `num_layers`."""
    del decoder_layers(backbone)[num_layers:]
    shorten(backbone.config, num_layers)


def model_config(spec: Pretrained, key: str = KEY) -> Any:
    """The model's configuration, without its weights."""
    with _read(spec, key):
        return AutoConfig.from_pretrained(
            spec.path, revision=spec.revision or "main", trust_remote_code=spec.trust_remote_code
        )


def hidden_size(spec: Pretrained) -> int:
    """Width H of the hidden states, from the model's configuration alone."""
    return int(model_config(spec).hidden_size)


def load_tokenizer(spec: Pretrained, key: str = KEY) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to `spec`."""
    with loading(spec.path, key):
        tokenizer = AutoTokenizer.from_pretrained(
            spec.path, revision=spec.revision or "main", trust_remote_code=spec.trust_remote_code
        )
    return cast("PreTrainedTokenizerBase", tokenizer)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, spec: Pretrained, key: str) -> None:
    """Refuse a model that reads other token ids than those a tokenizer writes.

    Args:
        tokenizer: The tokenizer of the data.
        spec: The model.
        key: The option to change, for the message.

    Raises:
        ValueError: Their vocabularies differ.
    """
    if load_tokenizer(spec).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{key}: expected the data's tokenizer and the model to have one vocabulary, got "
            f"{tokenizer.name_or_path!r} and {spec.path!r}. PPO reads texts anew for an "
            "ensemble of another tokenizer, and calibrates it so."
        )


def decoder_layers(backbone: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks of a backbone, whatever the architecture calls it.

    Raises:
        ValueError: No such list is found.
    """
    count = getattr(getattr(backbone, "config", None), "num_hidden_layers", None)
    for module in backbone.children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"expected a decoder with {count} blocks in one ModuleList, got {type(backbone).__name__}")


def plain_layers(backbone: nn.Module) -> dict[str, nn.Module]:
    """The modules of a backbone by the names that they have without adapters, whether peft has wrapped them or not."""
    named = backbone.named_modules()
    return {name.replace(".base_layer", ""): module for name, module in named if ".lora_" not in f".{name}"}


def final_norm(backbone: nn.Module) -> nn.Module:
    """The normalisation after the last block (`norm` in Llama-like models, `ln_f` in GPT-2)."""
    for name in ("norm", "ln_f", "final_layernorm", "final_layer_norm"):
        module = getattr(backbone, name, None)
        if isinstance(module, nn.Module):
            return module
    raise ValueError(f"expected a final normalisation layer, got none in {type(backbone).__name__}")


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to zero, so that train and eval mode give the same log-probabilities.

    PPO's ratio compares two forward passes of the same policy; dropout would make it differ from 1 by noise.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def freeze(module: nn.Module) -> nn.Module:
    """Take every parameter out of training and switch to evaluation mode."""
    return module.requires_grad_(False).eval()


def place(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Freeze a model and move it to a device; a quantised one was loaded where it belongs."""
    freeze(model)
    return model if getattr(model, "is_quantized", False) else cast("PreTrainedModel", model.to(device))
