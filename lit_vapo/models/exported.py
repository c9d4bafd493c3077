"""Folders of exported policies: what they hold, and whether a base fits. Nothing heavy is loaded to find out."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Annotated, Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field

from lit_vapo.folders import absolute, if_moved
from lit_vapo.models.digests import check_sealed
from lit_vapo.models.pretrained import Lora, Pretrained, model_config
from lit_vapo.models.settings import read_settings
from lit_vapo.models.tensors import check_finite, read_tensors

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIG, WEIGHTS = "config.json", (".safetensors", ".bin")
# Kinds of adapters whose update is not alpha / rank · B·A on the layers named by `target_modules`.
UNSUPPORTED = (
    *("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication"),
    *("target_parameters", "trainable_token_indices", "exclude_modules"),
)


class AdapterFile(BaseModel):
    """What is read of the `adapter_config.json` that peft writes."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    peft_type: str
    base_model_name_or_path: str | None = None
    r: Annotated[int, Field(ge=1, le=100_000)]
    lora_alpha: Annotated[float, Field(gt=0)]
    target_modules: str | list[str]
    layers_to_transform: list[int] | None = None
    bias: str = "none"


def is_adapter(folder: str | Path) -> bool:
    """Whether an exported policy is an adapter, rather than a whole model."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def check_policy(folder: str, base: Pretrained, lora: Lora | None) -> Lora | None:
    """The adapters to train when starting from an exported policy.

    Args:
        folder: The exported policy.
        base: The base it should belong to.
        lora: What the user asked for.

    Returns:
        The settings of the folder's adapter, or `lora` if the folder holds a whole model.

    Raises:
        ValueError: There is no policy in the folder, it belongs to another base, or it contradicts `lora`.
    """
    path = Path(folder)
    # Other programs write such folders, too, and note no digests.
    check_sealed(path, required=False)
    if is_adapter(path):
        found = _adapter_settings(path, base)
        if lora is not None:
            _refuse_contradiction(folder, lora, found, _num_layers(base))
        return found
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        held = sorted(x.name for x in path.iterdir())[:5] if path.is_dir() else "no folder"
        raise ValueError(
            f"model.policy: expected a folder with an exported policy ({ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, or "
            f"config.json and *.safetensors), got {folder!r} with {held}"
        )
    own, theirs = model_config(Pretrained(str(path.resolve()))), model_config(base)
    for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        if getattr(own, name, None) != getattr(theirs, name, None):
            raise ValueError(
                f"model.policy: expected a model of the same {name} as model.base ({base.path!r}), "
                f"{getattr(theirs, name, None)!r}, got {getattr(own, name, None)!r} in {folder!r}"
            )
    return lora


def _adapter_settings(path: Path, base: Pretrained) -> Lora:
    """Settings of an adapter of `base`."""
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"model.policy: expected {ADAPTER_WEIGHTS} beside {ADAPTER_CONFIG}, got none in {str(path)!r}")
    config = read_settings(path / ADAPTER_CONFIG, AdapterFile)
    if not same_weights(config.base_model_name_or_path, base.path):
        raise ValueError(
            f"model.policy: expected an adapter of model.base, {base.path!r}, got one of "
            f"{config.base_model_name_or_path!r} in {str(path)!r}{if_moved(config.base_model_name_or_path)}"
        )
    kind, odd = config.peft_type, [name for name in UNSUPPORTED if (config.model_extra or {}).get(name)]
    if kind != "LORA" or odd or config.bias != "none":
        raise ValueError(
            f"model.policy: expected a plain LoRA adapter, got peft_type {kind!r} with {odd or config.bias} "
            f"in {str(path)!r}"
        )
    layers, top, count = config.layers_to_transform, None, _num_layers(base)
    if layers is not None:
        top = len(layers)
        if sorted(layers) != list(range(count - top, count)):
            raise ValueError(
                f"model.policy: expected an adapter of the topmost layers of {count}, got one of layers {layers} in "
                f"{str(path)!r}"
            )
    targets = config.target_modules
    return Lora(config.r, config.lora_alpha, targets if isinstance(targets, str) else sorted(targets), top)


def _refuse_contradiction(folder: str, asked: Lora, found: Lora, count: int) -> None:
    wanted = (asked.rank, float(asked.alpha), asked.top_layers or count)
    got = (found.rank, found.alpha, found.top_layers or count)
    # `all-linear` is the default, so it is no wish.
    targets = asked.target_modules
    others = targets != "all-linear" and sorted([targets] if isinstance(targets, str) else targets)
    if wanted != got or (others and others != found.target_modules):
        raise ValueError(
            f"model.lora: expected the adapter of model.policy ({folder!r}), {found}, or null to take it from there, "
            f"got {asked}"
        )


def load_adapter_weights(lm: PeftModel, name: str, folder: str | Path) -> None:
    """Read a saved adapter into the one of this name.

    Raises:
        ValueError: The saved one has other layers or shapes.
    """
    saved = read_tensors(Path(folder) / ADAPTER_WEIGHTS)
    check_finite(saved, Path(folder) / ADAPTER_WEIGHTS)
    own = {k: v.shape for k, v in get_peft_model_state_dict(lm, adapter_name=name).items()}
    differing = [k for k in sorted(own.keys() | saved.keys()) if k not in saved or own.get(k) != saved[k].shape]
    if differing:
        first = differing[0]
        raise ValueError(
            f"model.policy: expected an adapter of this base, {first} of shape {_shape(own.get(first))}, got "
            f"{_shape(saved[first].shape if first in saved else None)} in {str(folder)!r} ({len(differing)} differ)"
        )
    set_peft_model_state_dict(lm, saved, adapter_name=name)


def same_place(one: Any, other: Any) -> bool:
    """Whether two paths or hub names mean the same."""
    if one == other:
        return True
    paths = [Path(absolute(str(x))) for x in (one, other)]
    return all(p.is_dir() for p in paths) and paths[0].resolve() == paths[1].resolve()


def same_weights(one: Any, other: Any) -> bool:
    """Whether two paths or hub names are of the same model: they mean the same, or one folder is a copy of the other.

    Of copies, the configuration and every byte of the weights are compared.
    """
    if same_place(one, other):
        return True
    left, right = (Path(absolute(str(x))) for x in (one, other))
    names, others = ({p.name for p in x.glob("*") if p.name == CONFIG or p.suffix in WEIGHTS} for x in (left, right))
    if names != others or CONFIG not in names or names == {CONFIG}:
        return False
    return not any(filecmp.cmpfiles(left, right, sorted(names), shallow=False)[1:])


def same_model(one: Pretrained, other: Pretrained) -> bool:
    """Whether two specifications give the same frozen weights."""
    alike = (one.revision, one.quantization) == (other.revision, other.quantization)
    return alike and same_weights(one.path, other.path)


def _shape(shape: Any) -> str:
    return "none" if shape is None else str(tuple(shape))


def _num_layers(base: Pretrained) -> int:
    return int(model_config(base).num_hidden_layers)
