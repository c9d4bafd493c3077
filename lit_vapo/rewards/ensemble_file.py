"""`ensemble.json`: what an ensemble is made of, and what its head reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from lit_vapo.models.digests import check_sealed
from lit_vapo.models.older import renamed
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.models.settings import STRICT, Component, read_settings, whole_paths
from lit_vapo.models.trunk import Pooling
from lit_vapo.models.trust import check_trusted

CONFIG_NAME = "ensemble.json"
WEIGHTS_NAME = "head.safetensors"


@dataclass
class FeatureSpec:
    """Which hidden states of which model a head reads.

    Args:
        base: The backbone.
        layer: Read after this many blocks; `None` after the last.
        pooling: `last` or `mean` (see `pool`).
        ends: Tokens that are not read where they end a response (see `content_lengths`).
    """

    base: Pretrained
    layer: int | None = None
    pooling: Pooling = "last"
    ends: list[int] = field(default_factory=list)


class EnsembleConfig(BaseModel):
    """What `ensemble.json` says.

    Attributes:
        spec: What the head reads.
        hidden_size: Width H of the features.
        num_members: Members K of the ensemble.
        members: Numbers of those that are in the folder.
        own_backbone: Whether the folder has a backbone, trained, in place of the base.
        head: The estimator.
    """

    model_config = STRICT

    format_version: Literal[3] = 3
    spec: FeatureSpec
    # Bounds far above any use: a folder should not be able to ask for all the memory there is.
    hidden_size: Annotated[int, Field(ge=1, le=1_000_000)]
    num_members: Annotated[int, Field(ge=1, le=10_000)]
    members: list[Annotated[int, Field(ge=0)]]
    own_backbone: bool
    head: Component

    @model_validator(mode="after")
    def _members_agree(self) -> EnsembleConfig:
        allowed, layer = range(self.num_members), self.spec.layer
        if not self.members or len(set(self.members)) < len(self.members) or max(self.members) not in allowed:
            raise ValueError(f"members: expected different numbers 0 … {allowed[-1]}, got {self.members[:20]}")
        if layer is not None and layer < 1:
            raise ValueError(f"spec.layer: expected 1 or more, or null, got {layer}")
        if any(end < 0 for end in self.spec.ends):
            raise ValueError(f"spec.ends: expected token ids of 0 or more, got {self.spec.ends[:20]}")
        return self


def write_config(folder: Path, config: EnsembleConfig) -> None:
    """Write the description of an ensemble, with the folder of its base as an absolute path."""
    whole = json.dumps(whole_paths(config.model_dump(mode="json")), indent=2)
    (folder / CONFIG_NAME).write_text(whole + "\n")


def read_config(folder: str | Path) -> EnsembleConfig:
    """The description of a saved ensemble. Nothing that it names is imported.

    Raises:
        ValueError: The folder holds no ensemble, one of another format, or one that was changed since it was written.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(
            f"reward: expected a folder with {CONFIG_NAME} (written by `lit-vapo export`), got {str(folder)!r}"
        )
    config = read_settings(path, EnsembleConfig)
    check_sealed(folder, CONFIG_NAME)
    config.head.class_path = renamed(config.head.class_path)
    return config


def read_trusted_config(folder: str | Path, trust: Sequence[str] | None) -> EnsembleConfig:
    """The description of a saved ensemble that asks for no code but this package's and what `trust` allows.

    Raises:
        ValueError: As `read_config` and `check_trusted`.
    """
    config = read_config(folder)
    check_trusted(config.model_dump(), trust, str(Path(folder) / CONFIG_NAME))
    return config
