"""Variance-aware RLHF: the KL to the reference is dearer where the ensemble disagrees (2507.15906)."""

from __future__ import annotations

from typing import Literal

import torch

from lit_vapo.objectives.base import Objective, Score, all_members
from lit_vapo.types import RewardEstimate


class VarianceAware(Objective):
    """Reward mean_k r_k − β·w·KL with w = σ²(x, y), up to scale.

    The optimum is π*(y) = π0(y)·exp((R̂(y) − c) / (β·w(y))): the policy leaves its reference only as far as the
    members agree. With `scale` = `reference`, w is σ² divided by its mean over responses of the reference policy,
    so that E_π0[w] = 1 and β means what it means in plain PPO; a constant variance then gives `MeanReward`.

    Args:
        scale: `reference`, or `none` for w = σ² as in the paper (β then depends on the unit of the reward).
        min_weight: Smallest w: where members happen to agree, w → 0 would switch the KL off.
        max_weight: Largest w: a huge w would freeze the policy on a response.
        member: Use this member's reward in place of the mean; the variance is the ensemble's either way.

    Raises:
        ValueError: Not 0 <= min_weight <= max_weight.
    """

    needs_variance = True

    def __init__(
        self,
        scale: Literal["reference", "none"] = "reference",
        min_weight: float = 0.1,
        max_weight: float = 10.0,
        member: int | None = None,
    ) -> None:
        super().__init__()
        self.check_limits(min_weight, max_weight)
        self.scale = scale
        self.min_weight = min_weight
        self.max_weight = max_weight
        self.member = member
        self.needs_members = member is not None

    def check_limits(self, min_weight: float, max_weight: float) -> None:
        """Refuse limits between which there is no weight.

        Raises:
            ValueError: Not 0 <= min_weight <= max_weight.
        """
        if not 0 <= min_weight <= max_weight:
            raise ValueError(f"expected 0 <= min_weight <= max_weight, got {min_weight} and {max_weight}")

    def check_members(self, num_members: int, separate: bool = True) -> None:
        """Refuse a source with fewer than two members, or without the chosen one.

        Raises:
            ValueError: K < 2, or no such member.
        """
        super().check_members(num_members, separate)
        if self.member is not None and not 0 <= self.member < num_members:
            raise ValueError(f"member: expected an index below the {num_members} members, got {self.member}")

    def forward(self, estimate: RewardEstimate) -> Score:
        """Score B responses, and weight the KL of each by the variance of its reward.

        Raises:
            ValueError: The weight is to be in units of the reference's variance, which nobody has measured.
        """
        weight = estimate.variance
        if self.scale == "reference":
            unit = estimate.reference_variance
            if unit is None:
                raise ValueError(
                    "VarianceAware with scale `reference`: expected an estimate with the variance on responses of the "
                    "reference, got one without; calibrate the source of rewards, or choose scale `none`"
                )
            # Where the reference's variance is zero the members always agree: no response is riskier than another.
            weight = torch.where(unit > 0, weight / unit.clamp_min(1e-12), torch.ones_like(weight))
        reward = estimate.mean if self.member is None else all_members(estimate, self)[:, self.member]
        return Score(reward, weight.clamp(self.min_weight, self.max_weight))
