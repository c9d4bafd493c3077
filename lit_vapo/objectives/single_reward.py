"""Standard RLHF against one reward model: the baseline of 2507.15906."""

from __future__ import annotations

from lit_vapo.objectives.base import Objective, Score, all_members, ones_like_mean
from lit_vapo.ranges import NonNegativeInt, check_ranges
from lit_vapo.types import RewardEstimate


class SingleReward(Objective):
    """Reward r_j − β·KL: standard RLHF against member j alone.

    Args:
        member: Index j of the member, counted from 0.
    """

    needs_members = True

    def __init__(self, member: NonNegativeInt = 0) -> None:
        super().__init__()
        check_ranges(SingleReward, locals())
        self.member = member

    def check_members(self, num_members: int, separate: bool = True) -> None:
        """Refuse an ensemble without a member of this index.

        Raises:
            ValueError: There is no such member.
        """
        super().check_members(num_members, separate)
        if self.member >= num_members:
            raise ValueError(f"member: expected an index below the {num_members} members, got {self.member}")

    def forward(self, estimate: RewardEstimate) -> Score:
        """Score B responses by the chosen member."""
        return Score(all_members(estimate, self)[:, self.member], ones_like_mean(estimate))
