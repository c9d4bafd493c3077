"""Uncertainty-weighted optimisation: the mean less a multiple of the variance (2310.02743)."""

from __future__ import annotations

from lit_vapo.objectives.base import Objective, Score, ones_like_mean
from lit_vapo.ranges import NonNegativeFloat, check_ranges
from lit_vapo.types import RewardEstimate


class UncertaintyWeighted(Objective):
    """Reward mean_k r_k − λ·σ² − β·KL (UWO of Coste et al. 2310.02743).

    σ² is unbiased (ddof 1) here as everywhere; the source divides by K, so its λ is ours times (K − 1)/K.

    Args:
        penalty: λ, in 1/units of reward; 0 gives `MeanReward`.

    Raises:
        ValueError: `penalty` is negative.
    """

    needs_variance = True

    def __init__(self, penalty: NonNegativeFloat = 0.5) -> None:
        super().__init__()
        check_ranges(UncertaintyWeighted, locals())
        self.penalty = penalty

    def forward(self, estimate: RewardEstimate) -> Score:
        """Score B responses by the mean less the penalised variance."""
        return Score(estimate.mean - self.penalty * estimate.variance, ones_like_mean(estimate))
