"""Conditional value at risk over members: the mean of those that like a response least (Rockafellar & Uryasev 2002)."""

from __future__ import annotations

from lit_vapo.functional import lower_tail_mean
from lit_vapo.objectives.base import Objective, Score, all_members, ones_like_mean
from lit_vapo.ranges import Share, check_ranges
from lit_vapo.types import RewardEstimate


class ConditionalValueAtRisk(Objective):
    """Reward: the mean of the worst share α of a response's members, − β·KL.

    Each response has its own worst members. Where α·K is no whole number, a member counts by the fraction that is left,
    so the reward is continuous in α. α = 1 is `MeanReward`, α ≤ 1/K is `WorstCase`. Unlike a minimum it does not fall
    with the number of members: α = 0.2 is the worst fifth of five members and of a hundred.

    Args:
        share: α, above 0 and at most 1.

    Raises:
        ValueError: `share` is out of range.
    """

    needs_members = True

    def __init__(self, share: Share = 0.5) -> None:
        super().__init__()
        check_ranges(ConditionalValueAtRisk, locals())
        self.share = share

    def forward(self, estimate: RewardEstimate) -> Score:
        """Score B responses by the mean of their worst members.

        Raises:
            ValueError: The estimator has no separate members.
        """
        return Score(lower_tail_mean(all_members(estimate, self), self.share), ones_like_mean(estimate))
