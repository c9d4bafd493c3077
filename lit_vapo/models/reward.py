"""A reward model: a backbone, a pooling, and a head that knows its uncertainty."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_vapo.models.adapters import load_adapter, save_adapter
from lit_vapo.models.pretrained import Pretrained, decoder_layers, freeze, load_backbone, load_tokenizer
from lit_vapo.models.trunk import Pooling, pooled
from lit_vapo.types import RewardEstimate
from lit_vapo.uncertainty.base import RewardHead

CONFIG_NAME = "ensemble.json"
WEIGHTS_NAME = "head.safetensors"
BACKBONE_NAME = "backbone"
FORMAT_VERSION = 2


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
        backbone: The backbone, cut off at `spec.layer` and attached to the head (`attach`), or `None`.

    Attributes:
        lender: Opens a block in which somebody else's backbone, to which the head is attached, is to be used; `None` if
            nobody lends one. It stays theirs: it is no part of this module.
    """

    def __init__(self, spec: FeatureSpec, head: RewardHead, backbone: Any) -> None:
        super().__init__()
        self.spec = spec
        self.head = head
        self.backbone = backbone
        self.lender: Callable[[], AbstractContextManager[PreTrainedModel]] | None = None

    def encode(self, input_ids: Tensor, lengths: Tensor, prompt_lengths: Tensor) -> Tensor:
        """Features (B, H) of right-padded sequences (B, L), or (B, K, H) where members differ in them."""
        rows = (input_ids, lengths, prompt_lengths)
        return self.head.join([pooled(x, *rows, self.spec.pooling) for x in self.passes()])

    def passes(self) -> Iterator[PreTrainedModel]:
        """The models to run, one after another."""
        if self.lender is not None:
            with self.lender() as backbone:
                yield from self.head.passes(backbone)
        elif self.backbone is None:
            raise ValueError("this reward model was loaded without its backbone: expected features, got token ids")
        else:
            yield from self.head.passes(self.backbone)

    def forward(self, input_ids: Tensor, lengths: Tensor, prompt_lengths: Tensor) -> RewardEstimate:
        """Estimate of the normalised reward of right-padded sequences (B, L)."""
        estimate: RewardEstimate = self.head(self.encode(input_ids, lengths, prompt_lengths))
        return estimate

    def save_pretrained(self, folder: str | Path, save_backbone: bool = False) -> None:
        """Write `ensemble.json`, `head.safetensors`, members' adapters or backbones, and a backbone that was trained.

        Raises:
            FileExistsError: The folder already holds an ensemble.
        """
        folder = Path(folder)
        if (folder / CONFIG_NAME).exists():
            raise FileExistsError(f"{folder}: expected a folder without an ensemble, got one that holds {CONFIG_NAME}")
        if self.backbone is None and (save_backbone or not self.head.shares_features):
            raise ValueError("save_backbone: expected a reward model with a backbone, got one without")
        folder.mkdir(parents=True, exist_ok=True)
        members = self.head.present_members
        if self.head.owns_backbones:
            for k, member in zip(members, self.head.passes(self.backbone), strict=True):
                member.save_pretrained(folder / f"member_{k}")
        elif save_backbone:
            self.backbone.save_pretrained(folder / BACKBONE_NAME)
        for k, adapter in enumerate(self.head.adapters()):
            save_adapter(folder / f"member_{k}", adapter, self.backbone, self.spec.base.path)
        kind = type(self.head)
        config = {
            "format_version": FORMAT_VERSION,
            "spec": asdict(self.spec),
            "hidden_size": self.head.hidden_size,
            "num_members": self.head.num_members,
            "members": list(members),
            "own_backbone": save_backbone and not self.head.owns_backbones,
            "head": {
                "class_path": f"{kind.__module__}.{kind.__qualname__}",
                "init_args": self.head.init_args(),
            },
        }
        save_file({k: v.contiguous() for k, v in self.head.saved_state().items()}, folder / WEIGHTS_NAME)
        # Written last: a folder with this file is complete.
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, with_backbone: bool = True, lent: PreTrainedModel | None = None
    ) -> RewardModel:
        """Load what `save_pretrained` wrote, in evaluation mode.

        Args:
            folder: The ensemble's folder.
            with_backbone: Load the backbone too; off if the caller brings features, which members must share.
            lent: A frozen backbone of the same base to attach the members to in place of one of their own. The caller
                keeps it, and says with `lender` when it may be used.

        Raises:
            ValueError: The folder holds no ensemble, one that this version cannot read, or one that lacks a member.
        """
        folder = Path(folder)
        config = read_config(folder)
        spec = read_spec(config)
        head = build_head(config["head"]["class_path"], config["head"]["init_args"], config["hidden_size"])
        if len(config["members"]) < head.num_members:
            raise ValueError(
                f"{folder}: expected all {head.num_members} members, got member {config['members']} alone. Join the "
                "members' folders with `lit-vapo reward join`."
            )
        if not (with_backbone or head.shares_features):
            raise ValueError(
                f"with_backbone: expected true for {type(head).__name__}, whose members change the backbone"
            )
        backbone = None
        if lent is not None:
            _attach(folder, spec, head, lent)
        elif with_backbone:
            backbone = _load_backbone(folder, spec, head, config["own_backbone"])
        _load_head(head, folder / WEIGHTS_NAME)
        return cls(spec, head, backbone).requires_grad_(False).eval()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the backbone."""
        return load_tokenizer(self.spec.base)


def _load_backbone(folder: Path, spec: FeatureSpec, head: RewardHead, own: bool) -> Any:
    if head.owns_backbones:
        for k in range(head.num_members):
            if not (folder / f"member_{k}" / "config.json").is_file():
                raise ValueError(f"{folder}: expected the model of member {k} in {folder / f'member_{k}'}, got none")
        readers = [partial(_load_saved, folder / f"member_{k}", spec) for k in range(head.num_members)]
        # Off the module's list of children where they are to be read anew at each call.
        return nn.ModuleList([read() for read in readers]) if head.resident else readers
    return _attach(
        folder, spec, head, _load_saved(folder / BACKBONE_NAME, spec) if own else load_backbone(spec.base, spec.layer)
    )


def _attach(folder: Path, spec: FeatureSpec, head: RewardHead, backbone: PreTrainedModel) -> Any:
    """Make the head's members at home in a backbone, with the adapters they were saved with."""
    attached = head.attach(backbone, decoder_layers(backbone))
    count = len(head.adapters())
    if count:
        head.load_adapters([load_adapter(folder / f"member_{k}", backbone, spec.base.path) for k in range(count)])
    return attached


def _load_saved(folder: Path, spec: FeatureSpec) -> PreTrainedModel:
    """A trained backbone as it was saved: cut off already, and in the type it was trained in."""
    saved = replace(spec.base, path=str(folder), revision=None, quantization=None, dtype="auto")
    return cast("PreTrainedModel", freeze(load_backbone(saved)))


def _load_head(head: RewardHead, path: Path) -> None:
    weights = load_file(path)
    expected = head.saved_state().keys()
    if weights.keys() != expected:
        raise ValueError(f"{path}: expected {sorted(expected)}, got {sorted(weights)}")
    head.load_state_dict(weights, strict=False)


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


def read_spec(config: dict[str, Any]) -> FeatureSpec:
    """What the head of a saved ensemble reads."""
    return FeatureSpec(**{**config["spec"], "base": Pretrained(**config["spec"]["base"])})


def build_head(class_path: str, init_args: dict[str, Any], hidden_size: int) -> RewardHead:
    """Import, construct and build a head.

    Raises:
        ValueError: The class is not a `RewardHead`.
    """
    head = head_class(class_path)(**init_args)
    head.build(hidden_size)
    return head


def head_class(class_path: str) -> type[RewardHead]:
    """Import an estimator.

    Raises:
        ValueError: The class is not a `RewardHead`.
    """
    module, _, name = class_path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    if not (isinstance(kind, type) and issubclass(kind, RewardHead)):
        raise ValueError(f"head.class_path: expected a subclass of RewardHead, got {class_path}")
    return kind
