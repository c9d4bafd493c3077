"""Advantages that trust a response's reward by its signal against its noise."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lit_vapo.advantages.base import Reduce, WholeResponses, known
from lit_vapo.functional import group_centre, group_scale, group_shrink
from lit_vapo.ranges import NonNegativeFloat, PositiveFloat, check_ranges
from lit_vapo.types import RewardEstimate


class SignalToNoise(WholeResponses):
    """`Grpo` with each reward shrunk towards its prompt's mean by what the ensemble doubts (after UARM, 2606.19818).

        A_i = [ w_i·(R̂_i - m) + (rest_i - mean_j rest_j) ] / (std_j R_j + ε),    rest = R - R̂

    R̂ and σ² are the members' mean and variance, m and the reliability w_i = S/(S + ν·σ_i²) those of
    `functional.group_shrink`: S is the part of the variance of R̂ within the prompt that noise does not explain. A
    response that members dispute counts for less, and a prompt whose responses differ no more than members do teaches
    nothing but the KL penalty. `noise` 0 gives `Grpo`.

    Departures from the paper. It has conformal widths of a quantile regression for σ_i, and the KL penalty in the loss.
    Here the penalty is in R, and rest is what R has besides R̂: penalties, and what the objective adds or takes. It is
    never shrunk, or KL would be cheap where members disagree. An objective that takes σ off the reward doubts twice:
    `MeanReward` and `VarianceAware` go best with this.

    Args:
        noise: ν: variance of the error of R̂ in units of σ². 1 takes σ² for it, as the objectives do; members whose
            errors are independent allow 1/K.
        eps: ε, in units of reward.
    """

    def __init__(self, noise: NonNegativeFloat = 1.0, eps: PositiveFloat = 1e-4) -> None:
        check_ranges(SignalToNoise, locals(), "model.advantage.")
        self.noise = noise
        self.eps = eps

    def check_rewards(self, num_members: int, separate: bool = True, named: Sequence[str] = ()) -> None:
        """Refuse a source that knows no variance.

        Raises:
            ValueError: There are fewer than two members.
        """
        if num_members < 2:
            raise ValueError(
                f"model.advantage: SignalToNoise needs the variance of an ensemble: expected at least 2 members, got "
                f"{num_members}"
            )

    def judge(
        self, rewards: Tensor, num_responses: int, all_sum: Reduce, estimate: RewardEstimate | None
    ) -> tuple[Tensor, Tensor | None]:
        """Rewards (B,), shrunk, centred and scaled within each prompt."""
        said = known(estimate, self)
        shrunk = group_shrink(said.mean, self.noise * said.variance.clamp_min(0), num_responses)
        rest = group_centre(rewards - said.mean, num_responses)
        scale = group_scale(rewards, num_responses, self.eps)
        return (shrunk + rest) / scale, 1 / scale
