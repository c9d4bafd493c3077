"""An objective that is told another variance than the ensemble's: how much does it rely on it?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_vapo.modules.checkpoint import seeded
from lit_vapo.objectives.base import Objective, Score
from lit_vapo.study.variance import Draws, ToldVariance
from lit_vapo.types import RewardEstimate


class Told(Objective):
    """An objective that is told a changed variance of each response, in training and evaluation.

    What is changed is σ² in units of its mean over the reference's responses, so that a power of it stays of order one;
    its own mean is not made one again. The members' variance stands for the true one, which PPO does not know. Chance
    comes from a seed of its own: the responses that are sampled are those of the objective alone.

    Args:
        objective: What is maximised.
        variance: Which variance it is told.
    """

    needs_variance = True
    unit: Tensor

    def __init__(self, objective: Objective, variance: ToldVariance) -> None:
        super().__init__()
        if not objective.needs_variance:
            raise ValueError(f"objective: expected one that uses the variance, got {type(objective).__name__}")
        if variance.exact:
            raise ValueError("variance.exact: expected false, as PPO knows no true variance; got true")
        self.objective = objective
        self.variance = variance
        self.register_buffer("unit", torch.ones(()))

    def prepare(self, num_members: int, reference_variance: Tensor) -> None:
        """Remember the unit; the objective meets the ensemble as it is."""
        super().prepare(num_members, reference_variance)
        self.objective.prepare(num_members, reference_variance)
        self.unit.copy_(reference_variance)

    def check_members(self, num_members: int) -> None:
        """Refuse what the objective refuses, and a single member."""
        super().check_members(num_members)
        self.objective.check_members(num_members)

    def check_responses(self, num_responses: int) -> None:
        """Refuse what the objective refuses."""
        self.objective.check_responses(num_responses)

    def forward(self, estimate: RewardEstimate) -> Score:
        """Score B responses as the objective does that is told another variance."""
        return self.objective(self._change(estimate))

    def observe(
        self, estimate: RewardEstimate, log_ratio: Tensor, num_responses: int, all_sum: Callable[[Tensor], Tensor]
    ) -> Score:
        """Score the responses of a training rollout, and learn from them."""
        return self.objective.observe(self._change(estimate), log_ratio, num_responses, all_sum)

    def statistics(self) -> dict[str, Tensor]:
        """What the objective logs."""
        return self.objective.statistics()

    def _change(self, estimate: RewardEstimate) -> RewardEstimate:
        unit = self.unit.clamp_min(1e-12)
        there = estimate.variance / unit
        with seeded(0):
            normal, order = torch.randn(len(there)).to(there), torch.randperm(len(there)).to(there.device)
        told = self.variance(Draws(there[None], there, normal[None], order[None]))[0]
        return estimate._replace(variance=told * unit)
