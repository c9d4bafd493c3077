"""Covariance-aware RLHF: penalise how far members disagree about what the policy has gained (2507.15906)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lit_vapo.functional import member_weights, prompt_gains
from lit_vapo.objectives.base import Objective, Score, all_members, ones_like_mean
from lit_vapo.ranges import NonNegativeFloat, NonNegativeInt, check_ranges
from lit_vapo.types import RewardEstimate


class CovarianceAware(Objective):
    """Reward mean_k r_k less a penalty on the spread over members of ΔJ_k = J_k(π) − J_k(π0), − β·KL.

    J_k(π) is member k's expected reward. The variance of ΔJ_k over members is the norm of π − π0 under the members'
    whole covariance (2507.15906 uses its diagonal). Form `bound` penalises λ·Std_k(ΔJ_k): mean − λ·Std is a lower
    confidence bound on the gain itself, where `LowerConfidence` takes one for each response by itself. Form
    `variance` penalises λ·Var_k(ΔJ_k). Either amounts to the reward Σ_k v_k·r_k with weights that sum to one
    (`functional.member_weights`), logged as `train/member_weight_k`.

    Assumed: members are normalised on the reference, so that J_k(π0) = 0 over all prompts. ΔJ_k is a running average
    over the responses of all processes, the batch at hand included: prompts' offsets then average out. `per_prompt`
    uses the other responses to the same prompt where they tell the gain (`functional.prompt_gains`). Evaluation uses
    the weights of the last training batch, 1/K before it.

    Args:
        penalty: λ; in standard deviations for `bound`, in 1/units of reward for `variance`. 0 gives `MeanReward`.
        form: What is penalised.
        per_prompt: Penalise the disagreement on each prompt by itself; needs several responses to each prompt.
        window: How many responses the running average looks back, the batch aside; 0 for the batch alone.

    Raises:
        ValueError: `penalty` or `window` is negative.
    """

    needs_variance = True
    needs_members = True
    totals: Tensor
    weights: Tensor

    def __init__(
        self,
        penalty: NonNegativeFloat = 1.0,
        form: Literal["bound", "variance"] = "bound",
        per_prompt: bool = False,
        window: NonNegativeInt = 512,
    ) -> None:
        super().__init__()
        check_ranges(CovarianceAware, locals())
        self.penalty = penalty
        self.form = form
        self.per_prompt = per_prompt
        self.window = window

    def check_responses(self, num_responses: int) -> None:
        """Refuse a single response where each prompt is judged by itself.

        Raises:
            ValueError: `per_prompt` with fewer than two responses to each prompt.
        """
        if self.per_prompt and num_responses < 2:
            raise ValueError(
                "CovarianceAware with per_prompt: expected model.sampling.num_responses of at least 2, "
                f"got {num_responses}"
            )

    def prepare(self, num_members: int) -> None:
        """Start without a memory: members count alike."""
        super().prepare(num_members)
        # Sums over the responses remembered: of each member's reward, of σ², and their number.
        self.register_buffer("totals", torch.zeros(num_members + 2))
        self.register_buffer("weights", torch.full((num_members,), 1 / num_members))

    def forward(self, estimate: RewardEstimate) -> Score:
        """Score B responses with the weights of the last training batch."""
        return self._score(estimate, self.weights)

    def observe(
        self, estimate: RewardEstimate, log_ratio: Tensor, num_responses: int, all_sum: Callable[[Tensor], Tensor]
    ) -> Score:
        """Take up a training batch into the running average, and score it with the weights that follow."""
        members = all_members(estimate, self)
        seen = torch.cat([members.sum(0), estimate.variance.sum()[None], members.new_full((1,), len(members))])
        seen = all_sum(seen)
        batch = seen[-1]
        self.totals.mul_(self.window / (self.window + batch)).add_(seen)
        gain, count = self.totals[:-2] / self.totals[-1], self.totals[-1]
        # The error of a mean over `count` responses whose members disagree by σ.
        noise = self.totals[-2] / count.square()
        if self.per_prompt:
            gain, share = prompt_gains(members, log_ratio, num_responses, gain)
            noise = share.square() * estimate.variance / (num_responses - 1) + (1 - share).square() * noise
        weights = member_weights(gain, self.penalty, self.form == "bound", noise)
        # Evaluation and the log have one weight for each member, the same in all processes.
        self.weights.copy_(all_sum(weights.sum(0)) / batch if self.per_prompt else weights)
        return self._score(estimate, weights)

    def statistics(self) -> dict[str, Tensor]:
        """The weight of each member in the last training batch."""
        return {f"member_weight_{k}": weight for k, weight in enumerate(self.weights.clone())}

    def _score(self, estimate: RewardEstimate, weights: Tensor) -> Score:
        # Relative to the mean, which an estimator may know better than its members do.
        tilt = weights - 1 / weights.shape[-1]
        return Score(estimate.mean + (all_members(estimate, self) * tilt).sum(-1), ones_like_mean(estimate))
