"""Worst-case optimisation: the reward of the member that likes a response least (2310.02743)."""

from __future__ import annotations

from lit_vapo.objectives.base import Objective, Score, all_members, ones_like_mean
from lit_vapo.types import RewardEstimate


class WorstCase(Objective):
    """Reward min_k r_k − β·KL (WCO of Coste et al. 2310.02743).

    The minimum falls with the number of members even where they agree in distribution: compare ensembles of one size.
    """

    needs_members = True

    def forward(self, estimate: RewardEstimate) -> Score:
        """Score B responses by the least of their members' rewards.

        Raises:
            ValueError: The estimator has no separate members.
        """
        return Score(all_members(estimate, self).amin(dim=1), ones_like_mean(estimate))
