"""Variance-aware RLHF with the weight in the reward: the optimum of `VarianceAware`, acting from the first step."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lit_vapo.functional import reward_origin
from lit_vapo.objectives.base import Score, ones_like_mean
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.types import RewardEstimate


class PrecisionWeighted(VarianceAware):
    """Reward c + (R̂ − c)/w − β·KL, with the w of `VarianceAware` and a plain KL.

    The optimum is that of `VarianceAware`, π*(y) = π0(y)·exp((R̂(y) − c)/(β·w(y))), at the same β. The way there is
    another. Any KL has a gradient of zero at the reference, and so has one with a weight: PPO's first steps follow R̂
    alone, wherever members disagree, and the weight has to take back what they did. Here the first steps follow
    R̂ − c over w, which is the direction of least variance for its gain (2507.15906). Rewards that members dispute are
    also what makes the gradient noisy, and they count for less.

    c is the prompt's (`functional.reward_origin`), from its other responses, or from all others where each prompt has
    one; that it is added again changes no gradient. Evaluation has c = 0: members are normalised to mean 0 on the
    reference.

    Its options are those of `VarianceAware`. `min_weight` is above 0: a reward counts at most 1/min_weight times.
    """

    kl_coef: Tensor | float = 0.0

    def check_limits(self, min_weight: float, max_weight: float) -> None:
        """Refuse a weight of 0 as well.

        Raises:
            ValueError: Not 0 < min_weight <= max_weight.
        """
        super().check_limits(min_weight, max_weight)
        if min_weight == 0:
            raise ValueError("expected min_weight > 0, since rewards are divided by it, got 0")

    def price(self, kl_coef: Tensor) -> None:
        """Take β, which says how far the optimum is from here."""
        self.kl_coef = kl_coef

    def forward(self, estimate: RewardEstimate) -> Score:
        """Score B responses, each by itself.

        Raises:
            ValueError: As in `VarianceAware`.
        """
        plain = super().forward(estimate)
        return Score(plain.reward / plain.kl_weight, ones_like_mean(estimate))

    def observe(
        self, estimate: RewardEstimate, log_ratio: Tensor, num_responses: int, all_sum: Callable[[Tensor], Tensor]
    ) -> Score:
        """Score the responses of a training rollout, with the origin that the others tell."""
        reward, weight = super().forward(estimate)
        origin = reward_origin(reward, weight, log_ratio, self.kl_coef, num_responses, all_sum)
        return Score((reward - origin) / weight + origin, ones_like_mean(estimate))
