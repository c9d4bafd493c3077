"""A Bayesian last layer: the variance of the reward in closed form."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lit_vapo.functional import laplace_preference, margin_estimate
from lit_vapo.ranges import PositiveFloat, PositiveInt, Smoothing, check_ranges
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.types import FeaturePairs, RewardEstimate


class BayesianLinear(RewardHead):
    """One linear head with a Gaussian posterior over its weights: variance φᵀH⁻¹φ (Laplace, last layer).

    The posterior is the Laplace approximation of Bayesian Bradley–Terry regression with the prior w ~ N(0, I/λ): its
    mode by Newton's method over all training pairs, its precision H = λI + Σ p(1−p)·ΔφΔφᵀ (Kristiadi et al.
    2002.10118; for rewards Yang et al. 2402.13210). On a frozen backbone Newton's method finds that mode from wherever
    gradient steps end, so their number and rate do not matter; on a trained backbone they train it.

    Mean and variance are exact. φ is taken from the mean over reference responses, since a reward is known up to a
    shift only; the variance of a margin is that of the difference, ΔφᵀH⁻¹Δφ. For objectives that want
    members, K weights are drawn from the posterior once.

    Args:
        num_members: Number of draws K that stand for members.
        prior_precision: λ, the precision of the prior on each weight; larger keeps weights and variance smaller. The
            default suits hidden states after a final normalisation, whose entries are about 1.
        label_smoothing: Share of preferences taken to be stated the wrong way round, in [0, 0.5).
        seed: Seed of initialisation and draws.

    Raises:
        ValueError: `prior_precision` is not positive.
    """

    factor: Tensor
    draws: Tensor
    centre: Tensor
    mode: Tensor

    def __init__(
        self,
        num_members: PositiveInt = 10,
        prior_precision: PositiveFloat = 30.0,
        label_smoothing: Smoothing = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(num_members, False, label_smoothing, seed=seed)
        check_ranges(BayesianLinear, locals())
        self.prior_precision = prior_precision

    def make_parameters(self, hidden_size: int) -> None:
        """Draw the weights; the posterior begins as the prior."""
        self.weight = nn.Parameter(self.draw((hidden_size,), hidden_size, stream=0)[0])
        # Posterior: w = mode + factor · ε with factor · factorᵀ = H⁻¹.
        self.register_buffer("mode", self.weight.detach().clone())
        self.register_buffer("factor", torch.eye(hidden_size) / self.prior_precision**0.5)
        drawn = [torch.randn(hidden_size, generator=self.generator(k, 1)) for k in range(self.num_members)]
        self.register_buffer("draws", torch.stack(drawn))
        self.register_buffer("centre", torch.zeros(hidden_size))

    def training_rewards(self, features: Tensor, example_ids: Tensor) -> Tensor:
        """Raw rewards (2B, 1) of the weights under training."""
        with torch.autocast(features.device.type, enabled=False):
            return features.float() @ self.weight[:, None]

    def rewards(self, features: Tensor) -> Tensor:
        """Raw rewards (B, K) of the K posterior draws."""
        with torch.autocast(features.device.type, enabled=False):
            return features.float() @ (self.mode + self.draws @ self.factor.T).T

    def forward(self, features: Tensor) -> RewardEstimate:
        """Exact mean (B,) and variance (B,) of the normalised reward; members (B, K) are draws."""
        members = self.normalise(self.rewards(features))
        mean, variance = self._exact(features.float() - self.centre)
        scale = self.reward_scale[0]
        return RewardEstimate(mean / scale, variance / scale.square(), members)

    def margin(self, chosen: Tensor, rejected: Tensor) -> RewardEstimate:
        """Exact mean and variance of the raw difference; members are draws."""
        mean, variance = self._exact(chosen.float() - rejected.float())
        members = margin_estimate(self.rewards(chosen), self.rewards(rejected)).members
        return RewardEstimate(mean, variance, members)

    def _exact(self, features: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(features.device.type, enabled=False):
            return features @ self.mode, (features @ self.factor).square().sum(1)

    @torch.no_grad()
    def settle(self, pairs: Iterable[FeaturePairs]) -> None:
        """The posterior given all training pairs."""
        parts = list(pairs)
        labels = [part.labels for part in parts]
        probability = torch.cat([x.probability for x in labels])
        probability = torch.lerp(probability, 1 - probability, self.label_smoothing)
        posterior = laplace_preference(
            torch.cat([part.chosen - part.rejected for part in parts]).float(),
            margin=torch.cat([x.margin for x in labels]),
            probability=probability,
            weights=torch.cat([x.weight for x in labels]),
            prior_precision=self.prior_precision,
            start=self.weight.detach(),
        )
        self.mode.copy_(posterior.mode)
        self.factor.copy_(posterior.factor)

    def fit_normaliser(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Draws share the unit of the mean reward; their origins are their own means over the responses."""
        self.centre.copy_(features.float().mean(0))
        loc, _ = super().fit_normaliser(features)
        scale = self._exact(features.float() - self.centre)[0].std(correction=1).clamp_min(1e-6)
        return loc, scale.expand(self.num_members)

    def linear_members(self) -> tuple[Tensor, Tensor] | None:
        """The normalised draws."""
        weight = (self.mode + self.draws @ self.factor.T) / self.reward_scale[:, None]
        return weight, -self.reward_loc / self.reward_scale

    def linear_mean(self) -> tuple[Tensor, Tensor] | None:
        """The normalised mean reward."""
        weight = self.mode / self.reward_scale[0]
        return weight.clone(), -(weight @ self.centre)
