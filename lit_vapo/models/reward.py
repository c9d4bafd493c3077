"""A reward model: a backbone, a pooling, and a head that knows its uncertainty."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_vapo.models.pretrained import Pretrained, load_backbone, load_tokenizer
from lit_vapo.models.trunk import Pooling, pool, run_trunk
from lit_vapo.types import RewardEstimate
from lit_vapo.uncertainty.base import RewardHead

CONFIG_NAME = "ensemble.json"
WEIGHTS_NAME = "head.safetensors"
BACKBONE_NAME = "backbone"
FORMAT_VERSION = 1


@dataclass
class FeatureSpec:
    """Which hidden states of which model a head reads.

    Args:
        base: The backbone.
        layer: Read after this many blocks; `None` after the last.
        pooling: `last` or `mean` (see `pool`).
    """

    base: Pretrained
    layer: int | None = None
    pooling: Pooling = "last"


class RewardModel(nn.Module):
    """Scores token sequences with a backbone and a head.

    The backbone may be missing (`None`): a head trained on cached features needs none, and a policy on the same
    base lends its own (`features` are then pooled by the caller).

    Args:
        spec: What the head reads.
        head: The head, already built.
        backbone: The backbone, cut off at `spec.layer`, or `None`.
    """

    def __init__(self, spec: FeatureSpec, head: RewardHead, backbone: PreTrainedModel | None) -> None:
        super().__init__()
        self.spec = spec
        self.head = head
        self.backbone = backbone

    def encode(self, input_ids: Tensor, lengths: Tensor, prompt_lengths: Tensor) -> Tensor:
        """Features (B, H) of right-padded sequences (B, L)."""
        if self.backbone is None:
            raise ValueError("this reward model was loaded without its backbone: expected features, got token ids")
        hidden = run_trunk(self.backbone, input_ids, lengths).last
        return pool(hidden, lengths, prompt_lengths, self.spec.pooling)

    def forward(self, input_ids: Tensor, lengths: Tensor, prompt_lengths: Tensor) -> RewardEstimate:
        """Estimate of the normalised reward of right-padded sequences (B, L)."""
        estimate: RewardEstimate = self.head(self.encode(input_ids, lengths, prompt_lengths))
        return estimate

    def save_pretrained(self, folder: str | Path, save_backbone: bool = False) -> None:
        """Write `ensemble.json` and `head.safetensors`, and the backbone if it was trained.

        Raises:
            FileExistsError: The folder already holds an ensemble.
        """
        folder = Path(folder)
        if (folder / CONFIG_NAME).exists():
            raise FileExistsError(f"{folder}: expected a folder without an ensemble, got one that holds {CONFIG_NAME}")
        folder.mkdir(parents=True, exist_ok=True)
        kind = type(self.head)
        config = {
            "format_version": FORMAT_VERSION,
            "spec": asdict(self.spec),
            "hidden_size": self.head.hidden_size,
            "num_members": self.head.num_members,
            "own_backbone": save_backbone,
            "head": {
                "class_path": f"{kind.__module__}.{kind.__qualname__}",
                "init_args": self.head.init_args(),
            },
        }
        if save_backbone:
            if self.backbone is None:
                raise ValueError("save_backbone: expected a reward model with a backbone, got one without")
            self.backbone.save_pretrained(folder / BACKBONE_NAME)
        save_file({k: v.contiguous() for k, v in self.head.state_dict().items()}, folder / WEIGHTS_NAME)
        # Written last: a folder with this file is complete.
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, with_backbone: bool = True) -> RewardModel:
        """Load what `save_pretrained` wrote, in evaluation mode.

        Args:
            folder: The ensemble's folder.
            with_backbone: Load the backbone too; off if the caller brings features.

        Raises:
            ValueError: The folder holds no ensemble, or one that this version cannot read.
        """
        config = read_config(folder)
        spec = FeatureSpec(**{**config["spec"], "base": Pretrained(**config["spec"]["base"])})
        head = build_head(config["head"]["class_path"], config["head"]["init_args"], config["hidden_size"])
        head.load_state_dict(load_file(Path(folder) / WEIGHTS_NAME))
        backbone = None
        if with_backbone:
            source = spec.base
            if config["own_backbone"]:
                source = Pretrained(str(Path(folder) / BACKBONE_NAME), dtype=source.dtype)
            backbone = load_backbone(source, None if config["own_backbone"] else spec.layer)
        model = cls(spec, head, backbone)
        return model.requires_grad_(False).eval()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the backbone."""
        return load_tokenizer(self.spec.base)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The description of a saved ensemble.

    Raises:
        ValueError: The folder holds no ensemble, or one of another format.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"reward: expected a folder with {CONFIG_NAME} (written by `lit-vapo export`), got {folder}")
    config: dict[str, Any] = json.loads(path.read_text())
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}, got {config.get('format_version')!r}")
    return config


def build_head(class_path: str, init_args: dict[str, Any], hidden_size: int) -> RewardHead:
    """Import, construct and build a head.

    Raises:
        ValueError: The class is not a `RewardHead`.
    """
    module, _, name = class_path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    if not (isinstance(kind, type) and issubclass(kind, RewardHead)):
        raise ValueError(f"head.class_path: expected a subclass of RewardHead, got {class_path}")
    head: RewardHead = kind(**init_args)
    head.build(hidden_size)
    return head
