"""A lower confidence bound: the mean less a multiple of the standard deviation (2401.00243)."""

from __future__ import annotations

from lit_vapo.objectives.base import Objective, Score, ones_like_mean
from lit_vapo.ranges import NonNegativeFloat, check_ranges
from lit_vapo.types import RewardEstimate


class LowerConfidence(Objective):
    """Reward mean_k r_k − λ·σ − β·KL (the penalised reward of UP-RLHF, Zhai et al. 2401.00243).

    Args:
        penalty: λ, in standard deviations; 0 gives `MeanReward`.

    Raises:
        ValueError: `penalty` is negative.
    """

    needs_variance = True

    def __init__(self, penalty: NonNegativeFloat = 1.0) -> None:
        super().__init__()
        check_ranges(LowerConfidence, locals())
        self.penalty = penalty

    def forward(self, estimate: RewardEstimate) -> Score:
        """Score B responses by the mean less the penalised standard deviation."""
        return Score(estimate.mean - self.penalty * estimate.sigma, ones_like_mean(estimate))
