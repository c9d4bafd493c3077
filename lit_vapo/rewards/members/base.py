"""The contract of all uncertainty estimators."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_vapo.functional import (
    bradley_terry_loss,
    fit_normaliser,
    margin_estimate,
    poisson_bootstrap,
)
from lit_vapo.models.quantised import keep_differentiable
from lit_vapo.ranges import PositiveInt, Smoothing, check_ranges
from lit_vapo.rewards.moderated import ModeratedNormaliser
from lit_vapo.rewards.normaliser import birthplace
from lit_vapo.types import Adapter, FeaturePairs, PairLabels, RewardEstimate


class RewardHead(ModeratedNormaliser, ABC):
    """Maps features of responses to a `RewardEstimate`, and knows its own training loss.

    Features are (B, H) where one backbone serves all members, and (B, K, H) where each member has its own adapters or
    weights. A subclass keeps every constructor argument as an attribute of the same name (so that a saved head can be
    built again), creates its parameters in `make_parameters`, and gives `rewards`. Where members change the
    backbone it also says how (`attach`, `passes`, `join`).

    Members leave `forward` normalised: each is centred and scaled on responses of the reference policy
    (`calibrate`, `Normaliser`).

    Args:
        num_members: Number of members K.
        bootstrap: Weight pairs by Poisson(1) counts per member; if off, members see the same data.
        label_smoothing: Share of preferences taken to be stated the wrong way round, in [0, 0.5).
        centering: Weight of the penalty (r_chosen + r_rejected)², which keeps rewards near zero.
        seed: Seed of initialisation and bootstrap.
        moderated: Shrink the variance of each response to the typical one, as far as K members leave it uncertain.
    """

    # Whether features are the backbone's own, the same for all members: they can then be computed once and kept, or
    # be taken from another model's pass over the same backbone.
    shares_features: bool = True
    # Whether each member is a whole backbone.
    owns_backbones: bool = False
    # Whether these are held in memory while scoring.
    resident: bool = True
    # Which rows of a batch its pass answers for, where not for all (see `learning_from`).
    rows: Tensor | None = None
    # Which rows of a batch each of its passes reads, where not all.
    reads: Sequence[Tensor] | None = None

    def __init__(
        self,
        num_members: PositiveInt,
        bootstrap: bool = True,
        label_smoothing: Smoothing = 0.0,
        centering: float = 0.0,
        seed: int = 0,
        moderated: bool = False,
    ) -> None:
        check_ranges(RewardHead, locals())
        super().__init__(num_members)
        self.num_members = num_members
        self.bootstrap = bootstrap
        self.label_smoothing = label_smoothing
        self.centering = centering
        self.seed = seed
        self.moderated = moderated
        self.hidden_size: int | None = None

    def build(self, hidden_size: int) -> None:
        """Create the parameters for features of width `hidden_size`; called once, before any use."""
        self.hidden_size = hidden_size
        with birthplace():
            self.make_parameters(hidden_size)

    @property
    def present_members(self) -> range:
        """Numbers of the members that are there."""
        return range(self.num_members)[self.present]

    @abstractmethod
    def make_parameters(self, hidden_size: int) -> None:
        """Register the parameters; the features have width `hidden_size`."""

    def draw(self, shape: Sequence[int], fan_in: int, stream: int) -> Tensor:
        """Initial weights (K, *shape) from N(0, 1/√(fan_in + 1)).

        Every member has a generator of its own, so that member k does not depend on K; `stream` tells its draws apart.
        """
        with birthplace():
            members = [torch.randn(tuple(shape), generator=self.generator(k, stream)) for k in range(self.num_members)]
        return torch.stack(members) / (fan_in + 1) ** 0.5

    def generator(self, member: int, stream: int) -> torch.Generator:
        """Random numbers of one member for one purpose, on the CPU."""
        return torch.Generator().manual_seed(((self.seed * 1_000_003 + member) * 1_000_003 + stream) % 2**63)

    # 1. Scores.

    @abstractmethod
    def rewards(self, features: Tensor) -> Tensor:
        """Raw rewards (B, K), in each member's own unit (a difference is a log-odds), float32."""

    def training_rewards(self, features: Tensor, example_ids: Tensor) -> Tensor:
        """What the loss sees: rewards (2B, K') where training differs from scoring.

        Args:
            features: Features of B preferred responses, then of the B others.
            example_ids: Identity of each pair (B,). What is drawn at random follows from it and from the step, and not
                from which process has the pair.
        """
        return self.rewards(features)

    def forward(self, features: Tensor) -> RewardEstimate:
        """Estimate of the normalised reward: mean (B,), variance (B,) with ddof 1, members (B, K)."""
        return self.estimate(self.rewards(features))

    def margin(self, chosen: Tensor, rejected: Tensor) -> RewardEstimate:
        """Estimate of the raw difference between two responses, in log-odds.

        Its variance is that of each member's own difference, so what a member adds to both responses cancels.
        """
        return margin_estimate(self.rewards(chosen), self.rewards(rejected))

    # 2. Training.

    def loss(self, chosen: Tensor, rejected: Tensor, labels: PairLabels) -> Tensor:
        """Training loss, a scalar: *summed* over members, so that K does not change a member's learning rate.

        Args:
            chosen: Features of the preferred responses.
            rejected: Features of the other responses.
            labels: Margins, soft labels, weights and identities of the pairs; bootstrap counts depend on the
                identity alone.
        """
        both = self.training_rewards(torch.cat([chosen, rejected]), labels.example_ids)
        return bradley_terry_loss(
            both[: len(chosen)],
            both[len(chosen) :],
            margin=labels.margin,
            probability=labels.probability,
            weights=self.pair_weights(labels, both.shape[1]),
            label_smoothing=self.label_smoothing,
            centering=self.centering,
        ).sum()

    def pair_weights(self, labels: PairLabels, columns: int) -> Tensor:
        """How often each pair counts for each of K' members (B, K'): its weight, times its bootstrap counts if any."""
        weights = labels.weight[:, None].expand(-1, columns)
        if not self.bootstrap:
            return weights
        return weights * poisson_bootstrap(labels.example_ids, self.num_members, self.seed)[:, self.present]

    def select(self, member: int) -> None:
        """Train one member by itself, with the weights and the bootstrap it would have among the others.

        Raises:
            ValueError: Members share what is trained, or there is no such member.
        """
        raise ValueError(f"model.member: expected null for {type(self).__name__}, whose members share a backbone")

    def settle(self, pairs: Iterable[FeaturePairs]) -> None:
        """Fix what is not learned by gradient, from the features of all training pairs.

        Called before scores are read off: at each validation and each checkpoint.
        """
        return

    @property
    def settles(self) -> bool:
        """Whether `settle` does anything, so that nobody computes features for nothing."""
        return type(self).settle is not RewardHead.settle

    @torch.no_grad()
    def calibrate(self, features: Tensor) -> None:
        """Fix each member's origin and unit, and the typical variance, on reference responses.

        Args:
            features: Features of N >= 2 responses of the reference policy.

        Raises:
            ValueError: A member's reward is not finite.
        """
        self.fit(*self.fit_normaliser(features))
        if self.moderated:
            self.moderate(self.rewards(features).float())
        self.measure(self(features).variance)

    def fit_normaliser(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Origin and unit of each member (K,) on reference responses."""
        return fit_normaliser(self.rewards(features).float())

    # 3. The backbone.

    def check_backbone(self, quantization: str | None, frozen: bool) -> None:
        """Refuse to train on a backbone on which these members cannot be trained.

        Args:
            quantization: How the backbone is quantised, or `None`.
            frozen: Whether the backbone's weights are to stay.

        Raises:
            ValueError: Quantised weights would be trained, or weights that the members bring themselves.
        """
        if quantization is not None and (not frozen or self.owns_backbones):
            raise ValueError(
                f"model.base.quantization: expected null where the backbone's own weights are trained, got "
                f"{quantization}. Train heads or adapters on a quantised base."
            )
        if not (frozen or self.shares_features):
            kind = type(self).__name__
            raise ValueError(f"model.freeze_backbone: expected true for {kind}, which brings what it trains, got false")

    def has_fixed_features(self, frozen: bool) -> bool:
        """Whether no training step changes the features, on a backbone whose weights stay if `frozen`."""
        return self.shares_features and frozen

    def in_training(self, backbone: nn.Module, blocks: nn.ModuleList) -> nn.Module:
        """A backbone whose features training changes, made ready for that.

        Args:
            backbone: A frozen decoder.
            blocks: Its transformer blocks.
        """
        if self.shares_features:
            # Small updates of weights in bfloat16 would be rounded away.
            return backbone.float().requires_grad_(True)
        keep_differentiable(backbone)
        return self.attach(backbone, blocks)

    def attach(self, backbone: nn.Module, blocks: nn.ModuleList) -> nn.Module:
        """Make a backbone ready for the members; the result is what `passes` gets.

        Args:
            backbone: A frozen decoder, on the CPU or where it was quantised.
            blocks: Its transformer blocks.
        """
        return backbone

    def passes(self, backbone: Any) -> Iterator[Any]:
        """The models to run one after another over a batch, or over all batches. A row may come back K-fold."""
        yield backbone

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A block in which the backbone's own passes are the members': within `passes`, and on the way back."""
        yield

    @contextmanager
    def learning_from(self, labels: PairLabels) -> Iterator[None]:
        """A block in which features are for the loss of these pairs alone: of others they may be anything finite."""
        yield

    def join(self, outputs: list[Tensor]) -> Tensor:
        """Features from the pooled states of all passes, each (B, H) or (B, K, H)."""
        (features,) = outputs
        return features

    # 4. On disk.

    def adapters(self) -> list[Adapter]:
        """Each member's low-rank adapters, which are saved in peft's format; empty where there are none."""
        return []

    def load_adapters(self, adapters: list[Adapter]) -> None:
        """Take the adapters that were read from a folder."""
        return

    def saved_state(self) -> dict[str, Tensor]:
        """What is saved beside backbone and adapters."""
        return self.state_dict()

    def linear_members(self) -> tuple[Tensor, Tensor] | None:
        """Weights (K, H) and biases (K,) of the normalised members if linear in shared features, else `None`."""
        return None

    def linear_mean(self) -> tuple[Tensor, Tensor] | None:
        """Weight (H,) and bias () of the mean normalised reward if it is linear in the features, else `None`.

        A critic on the same features starts from it.
        """
        members = self.linear_members()
        return None if members is None else (members[0].mean(0), members[1].mean(0))

    def init_args(self) -> dict[str, Any]:
        """The constructor arguments, read back from the attributes of the same names."""
        names = [name for name in inspect.signature(type(self).__init__).parameters if name != "self"]
        return {name: getattr(self, name) for name in names}
