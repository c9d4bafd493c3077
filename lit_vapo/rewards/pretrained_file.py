"""`rewards.json`: which public reward models score together, and beside it how their scores are normalised."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field
from safetensors.torch import save_file
from torch import Tensor

from lit_vapo.models.digests import check_sealed, seal
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.models.settings import STRICT, read_settings, whole_paths
from lit_vapo.models.tensors import check_finite, read_shapes, read_tensors
from lit_vapo.models.trust import check_trusted
from lit_vapo.rewards.normaliser import Normaliser

CONFIG_NAME, WEIGHTS_NAME = "rewards.json", "normaliser.safetensors"


class PretrainedConfig(BaseModel):
    """What `rewards.json` says.

    Attributes:
        models: The reward models, in the order of the members.
        resident: Whether all are held in memory at once.
        num_members: Members K: one of each model, or as many as the only model has labels.
    """

    model_config = STRICT

    format_version: Literal[1] = 1
    models: Annotated[list[Pretrained], Field(min_length=1, max_length=10_000)]
    resident: bool
    num_members: Annotated[int, Field(ge=1, le=10_000)]


def write_rewards(folder: Path, config: PretrainedConfig, normaliser: Normaliser) -> None:
    """Write both files, with the models' folders as absolute paths.

    Raises:
        FileExistsError: The folder holds such files already.
    """
    if (folder / CONFIG_NAME).exists():
        raise FileExistsError(f"{folder}: expected a folder without reward models, got one that holds {CONFIG_NAME}")
    folder.mkdir(parents=True, exist_ok=True)
    whole = json.dumps(whole_paths(config.model_dump(mode="json")), indent=2)
    (folder / CONFIG_NAME).write_text(whole + "\n")
    save_file({k: v.contiguous().cpu() for k, v in normaliser.state_dict().items()}, folder / WEIGHTS_NAME)
    # Written last: a folder with digests is complete.
    seal(folder)


def read_trusted_rewards(folder: Path, trust: Sequence[str] | None) -> PretrainedConfig:
    """What the folder says, if it asks for no code but what `trust` allows. Nothing that it names is loaded.

    Raises:
        ValueError: It cannot be read, was changed since it was written, or asks for code it is not trusted with.
    """
    config = read_settings(folder / CONFIG_NAME, PretrainedConfig)
    check_sealed(folder, CONFIG_NAME)
    check_trusted(config.model_dump(), trust, str(folder / CONFIG_NAME))
    return config


def read_normaliser(folder: Path, num_members: int) -> dict[str, Tensor]:
    """Origins, units and the reference variance from the folder, as a `Normaliser` of so many members has them.

    Raises:
        ValueError: They are damaged, of another number of members, or make no sense.
    """
    path = folder / WEIGHTS_NAME
    check_sealed(folder, WEIGHTS_NAME)
    own: dict[str, Tensor] = Normaliser(num_members).state_dict()
    expected, shapes = {name: tuple(x.shape) for name, x in own.items()}, read_shapes(path)
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            raise ValueError(f"{path}: expected {name} of shape {expected.get(name)}, got {shapes.get(name)}")
    found = read_tensors(path)
    for name, value in found.items():
        if value.dtype != own[name].dtype:
            raise ValueError(f"{path}: expected {name} in {own[name].dtype}, got {value.dtype}")
    check_finite(found, path)
    for name, allowed in (
        ("reward_scale", found["reward_scale"] > 0),
        ("reference_variance", found["reference_variance"] >= 0),
    ):
        if not bool(allowed.all()):
            raise ValueError(f"{path}: expected {name} above 0, got {float(found[name].min())}")
    return found
