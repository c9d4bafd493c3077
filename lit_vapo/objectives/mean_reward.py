"""Standard RLHF against the mean of the ensemble."""

from __future__ import annotations

from lit_vapo.objectives.base import Objective, Score, ones_like_mean
from lit_vapo.types import RewardEstimate


class MeanReward(Objective):
    """Reward mean_k r_k − β·KL: standard RLHF with an ensemble's mean as the reward."""

    def forward(self, estimate: RewardEstimate) -> Score:
        """Score B responses by the members' mean."""
        return Score(estimate.mean, ones_like_mean(estimate))
