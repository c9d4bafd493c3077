"""A reward model: a backbone, a pooling, and a head that knows its uncertainty."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_vapo.models.digests import check_sealed, seal
from lit_vapo.models.older import UNMODERATED, unmoderated
from lit_vapo.models.policy import Policy
from lit_vapo.models.pretrained import decoder_layers, freeze, load_backbone, load_tokenizer
from lit_vapo.models.settings import Component, import_class, make
from lit_vapo.models.sharding import most_of
from lit_vapo.models.tensors import check_finite, read_shapes, read_tensors
from lit_vapo.models.trunk import pooled
from lit_vapo.models.weights import hushed
from lit_vapo.rewards.adapters import load_adapter, save_adapter
from lit_vapo.rewards.ensemble_file import CONFIG_NAME, WEIGHTS_NAME, EnsembleConfig, read_trusted_config, write_config
from lit_vapo.rewards.ensemble_file import FeatureSpec as FeatureSpec
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.rewards.moderated import check_moderation
from lit_vapo.types import RewardEstimate

BACKBONE_NAME = "backbone"
# Rewards, their origins and units are of order one to a thousand; what is beyond would drown every other member.
LARGEST = 1e6


T = TypeVar("T")


class RewardModel(nn.Module):
    """Scores token sequences with a backbone and a head.

    The backbone may be missing (`None`): a head trained on cached features needs none, and a policy on the same
    base lends its own (`features` are then pooled by the caller).

    Args:
        spec: What the head reads.
        head: The head, already built.
        backbone: The backbone, cut off at `spec.layer` and attached to the head (`attach`), or `None`.

    Attributes:
        lender: Whose backbone the head is attached to; `None` if it has one of its own. It stays theirs, and is no part
            of this module.
    """

    lender: Policy | None

    def __init__(self, spec: FeatureSpec, head: RewardHead, backbone: Any) -> None:
        super().__init__()
        self.spec = spec
        self.head = head
        self.backbone = backbone
        self.borrow(None)

    def borrow(self, lender: Policy | None) -> None:
        """Use the backbone of a policy."""
        # Set as an attribute it would be registered, and the policy be a part of what scores it.
        self.__dict__["lender"] = lender

    def encode(self, input_ids: Tensor, lengths: Tensor, prompt_lengths: Tensor) -> Tensor:
        """Features (B, H) of right-padded sequences (B, L), or (B, K, H) where members differ in them."""
        options: dict[str, Any] = {"again": self.head.in_place, "rows": self.head.rows}
        reads: Iterator[Tensor | slice] = iter(self.head.reads or itertools.repeat(slice(None)))

        def features(backbone: PreTrainedModel) -> Tensor:
            rows = next(reads)
            part = input_ids[rows], lengths[rows], prompt_lengths[rows]
            return pooled(backbone, *part, self.spec.pooling, self.spec.ends, **options)[0]

        return self.head.join(self.each_pass(features))

    def each_pass(self, work: Callable[[PreTrainedModel], T]) -> list[T]:
        """What a function makes of each of the models to run, one after another."""
        if self.lender is not None:
            return self.lender.lend(lambda backbone: [work(model) for model in self.head.passes(backbone)])
        if self.backbone is None:
            raise ValueError("this reward model was loaded without its backbone: expected features, got token ids")
        return [work(model) for model in self.head.passes(self.backbone)]

    def most(self, count: int) -> int:
        """Passes that all processes take which share the backbone, of which this one needs `count`."""
        if self.lender is not None:
            return self.lender.most(count)
        return count if self.backbone is None else most_of(self.backbone, count)

    def forward(self, input_ids: Tensor, lengths: Tensor, prompt_lengths: Tensor) -> RewardEstimate:
        """Estimate of the normalised reward of right-padded sequences (B, L)."""
        estimate: RewardEstimate = self.head(self.encode(input_ids, lengths, prompt_lengths))
        return estimate

    @hushed()
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
        config = EnsembleConfig(
            spec=self.spec,
            hidden_size=cast("int", self.head.hidden_size),
            num_members=self.head.num_members,
            members=list(members),
            own_backbone=save_backbone and not self.head.owns_backbones,
            head=Component(class_path=f"{kind.__module__}.{kind.__qualname__}", init_args=self.head.init_args()),
        )
        save_file({k: v.contiguous() for k, v in self.head.saved_state().items()}, folder / WEIGHTS_NAME)
        write_config(folder, config)
        # Written last: a folder with digests is complete.
        seal(folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        with_backbone: bool = True,
        lent: PreTrainedModel | None = None,
        trust: Sequence[str] | None = None,
    ) -> RewardModel:
        """Load what `save_pretrained` wrote, in evaluation mode.

        Args:
            folder: The ensemble's folder.
            with_backbone: Load the backbone too; off if the caller brings features, which members must share.
            lent: A frozen backbone of the same base to attach the members to in place of one of their own. The caller
                keeps it (`borrow`).
            trust: Code outside of this package that the folder may ask for: classes by their Python name, models that
                bring code by folder or hub name.

        Raises:
            ValueError: The folder holds no ensemble, one that this version cannot read, one that lacks a member, or one
                that asks for code it is not trusted with.
        """
        folder = Path(folder)
        config = read_trusted_config(folder, trust)
        spec, head = config.spec, _load_head(folder, config)
        if len(config.members) < head.num_members:
            raise ValueError(
                f"{folder}: expected all {head.num_members} members, got member {config.members} alone. Join the "
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
            backbone = _load_backbone(folder, spec, head, config.own_backbone)
        return cls(spec, head, backbone).requires_grad_(False).eval()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the backbone."""
        return load_tokenizer(self.spec.base)


def _load_backbone(folder: Path, spec: FeatureSpec, head: RewardHead, own: bool) -> Any:
    if head.owns_backbones:
        for k in range(head.num_members):
            if not (folder / f"member_{k}" / "config.json").is_file():
                raise ValueError(f"{folder}: expected the model of member {k} in {folder / f'member_{k}'}, got none")
        check_sealed(folder, *(f"member_{k}" for k in range(head.num_members)))
        readers = [partial(_load_saved, folder / f"member_{k}", spec) for k in range(head.num_members)]
        # Off the module's list of children where they are to be read anew at each call.
        return nn.ModuleList([read() for read in readers]) if head.resident else readers
    if own:
        check_sealed(folder, BACKBONE_NAME)
        return _attach(folder, spec, head, _load_saved(folder / BACKBONE_NAME, spec))
    backbone = load_backbone(spec.base, spec.layer, f"the base of the ensemble in {str(folder)!r}")
    return _attach(folder, spec, head, backbone)


def _attach(folder: Path, spec: FeatureSpec, head: RewardHead, backbone: PreTrainedModel) -> Any:
    """Make the head's members at home in a backbone, with the adapters they were saved with."""
    width = getattr(backbone.config, "hidden_size", head.hidden_size)
    if width != head.hidden_size:
        raise ValueError(
            f"the base of the ensemble in {str(folder)!r}: expected hidden states of width {head.hidden_size}, got "
            f"{width} from {spec.base.path!r}"
        )
    own, loaded = head.adapters(), []
    for k, mine in enumerate(own):
        check_sealed(folder, f"member_{k}")
        adapter = load_adapter(folder / f"member_{k}", backbone, spec.base.path)
        if (adapter.rank, adapter.alpha, adapter.score.shape) != (mine.rank, mine.alpha, mine.score.shape):
            raise ValueError(
                f"{folder / f'member_{k}'}: expected rank {mine.rank}, alpha {mine.alpha} and a head of width "
                f"{len(mine.score)}, got {adapter.rank}, {adapter.alpha} and shape {tuple(adapter.score.shape)}"
            )
        loaded.append(adapter)
    attached = head.attach(backbone, decoder_layers(backbone))
    head.load_adapters(loaded)
    return attached


def _load_saved(folder: Path, spec: FeatureSpec) -> PreTrainedModel:
    """A trained backbone as it was saved: cut off already, and in the type it was trained in."""
    saved = replace(spec.base, path=str(folder), revision=None, quantization=None, dtype="auto")
    return cast("PreTrainedModel", freeze(load_backbone(saved, key=str(folder))))


def _load_head(folder: Path, config: EnsembleConfig) -> RewardHead:
    """The head with the weights that are saved beside backbone and adapters."""
    path, where = folder / WEIGHTS_NAME, folder / CONFIG_NAME
    check_sealed(folder, WEIGHTS_NAME)
    shapes = dict.fromkeys(UNMODERATED, ()) | read_shapes(path)
    members = shapes.get("reward_loc")
    if members != (config.num_members,):
        raise ValueError(f"{path}: expected reward_loc of shape ({config.num_members},), got {members}")
    try:
        head = make(cast("Any", RewardHead), config.head)
        if head.num_members != config.num_members:
            raise ValueError(f"num_members: expected {config.num_members}, as outside of it, got {head.num_members}")
        # First without memory: a folder gets no more of it than its own file takes.
        with torch.device("meta"):
            empty = build_head(config.head, config.hidden_size).saved_state()
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        # The latter say that a size is below zero, or no number of bytes.
        raise ValueError(f"{where}: head.{error}") from error
    expected = {name: tuple(x.shape) for name, x in empty.items()}
    if shapes != expected:
        name = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))[0]
        raise ValueError(f"{path}: expected {name} of shape {expected.get(name)}, got {shapes.get(name)}")
    head.build(config.hidden_size)
    weights = unmoderated() | read_tensors(path)
    own = head.saved_state()
    for name, value in weights.items():
        if value.dtype != own[name].dtype:
            raise ValueError(f"{path}: expected {name} in {own[name].dtype}, got {value.dtype}")
    check_finite(weights, path, LARGEST)
    for name in ("reward_scale", "reference_variance"):
        least = weights[name].min()
        if least < 0 or (least == 0 and name == "reward_scale"):
            raise ValueError(f"{path}: expected {name} above 0, got {float(least)}")
    check_moderation(weights, path)
    head.load_state_dict(weights, strict=False)
    return head


def ensemble_class(config: EnsembleConfig) -> type[RewardHead]:
    """The estimator of a saved ensemble, which was trusted already."""
    return import_class(cast("Any", RewardHead), config.head.class_path)


def build_head(component: Component, hidden_size: int) -> RewardHead:
    """Import, construct and build a head, whose class was trusted already.

    Raises:
        ValueError: The class is not a `RewardHead`, or cannot be made with these settings.
    """
    head = make(cast("Any", RewardHead), component)
    head.build(hidden_size)
    return head
