"""A member's low-rank adapters in peft's format, so that plain peft loads them too."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_vapo.folders import if_moved
from lit_vapo.models.exported import ADAPTER_CONFIG, AdapterFile, same_weights
from lit_vapo.models.exported import ADAPTER_WEIGHTS as WEIGHTS_NAME
from lit_vapo.models.settings import read_settings
from lit_vapo.models.tensors import check_finite, read_tensors
from lit_vapo.types import Adapter

ROOT = "base_model.model."
SCORE = f"{ROOT}score.weight"


def save_adapter(folder: Path, adapter: Adapter, backbone: PreTrainedModel, base: str) -> None:
    """Write one member as the adapter of a sequence classifier with one label.

    Loaded by `PeftModel.from_pretrained` on `AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)` it
    gives the member's raw reward, for heads that read the last token of the last block.

    Args:
        folder: A new folder.
        adapter: The member.
        backbone: What it adapts.
        base: The backbone's path or hub name.
    """
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=cast("int", adapter.alpha),
        lora_dropout=0.0,
        # Whole names: the blocks below the adapted ones have layers of the same kind.
        target_modules=sorted(adapter.weights),
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in backbone.modules()),
        modules_to_save=["score"],
        task_type="SEQ_CLS",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    weights = {SCORE: adapter.score[None].contiguous()}
    for name, (a, b) in adapter.weights.items():
        weights[f"{_prefix(backbone)}{name}.lora_A.weight"] = a.contiguous()
        weights[f"{_prefix(backbone)}{name}.lora_B.weight"] = b.contiguous()
    save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def load_adapter(folder: Path, backbone: PreTrainedModel, base: str) -> Adapter:
    """Read what `save_adapter` wrote.

    Raises:
        ValueError: The folder is missing or incomplete, or the adapter belongs to another base.
    """
    for name in (ADAPTER_CONFIG, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: expected a member with {name}, got none")
    config = read_settings(folder / ADAPTER_CONFIG, AdapterFile)
    if not same_weights(config.base_model_name_or_path, base):
        noted = config.base_model_name_or_path
        raise ValueError(f"{folder}: expected an adapter of {base!r}, got one of {noted!r}{if_moved(noted)}")
    weights = read_tensors(folder / WEIGHTS_NAME)
    check_finite(weights, folder / WEIGHTS_NAME)
    score = weights.pop(SCORE, None)
    prefix = _prefix(backbone)
    strange = [key for key in weights if not key.startswith(prefix)]
    if score is None or strange:
        raise ValueError(f"{folder}: expected a reward head and adapters below {prefix!r}, got {sorted(strange)[:3]}")
    names = sorted({key.removeprefix(prefix).rsplit(".", 2)[0] for key in weights})
    keys = {name: [f"{prefix}{name}.lora_{side}.weight" for side in "AB"] for name in names}
    expected = sorted(key for pair in keys.values() for key in pair)
    if expected != sorted(weights) or score.ndim != 2 or len(score) != 1:
        raise ValueError(
            f"{folder}: expected {SCORE} of shape (1, H) and two matrices for each layer, got shape "
            f"{tuple(score.shape)} and {sorted(set(expected) ^ set(weights))[:3]} without their like"
        )
    pairs: dict[str, tuple[Tensor, Tensor]] = {name: (weights[a], weights[b]) for name, (a, b) in keys.items()}
    return Adapter(config.r, config.lora_alpha, pairs, score[0])


def _prefix(backbone: PreTrainedModel) -> str:
    return f"{ROOT}{backbone.base_model_prefix}."
