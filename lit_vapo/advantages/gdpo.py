"""Group-relative advantages of several rewards, each normalised by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_vapo.advantages.base import Reduce, WholeResponses, check_named, known, named_rewards
from lit_vapo.functional import (
    Moments,
    group_centre,
    group_normalise,
    group_scale,
    masked_whiten,
    moments,
    whitening_scale,
)
from lit_vapo.ranges import PositiveFloat, check_ranges
from lit_vapo.types import RewardEstimate


class Gdpo(WholeResponses):
    """Each named reward of a `WeightedSum` in standard deviations of its prompt, then summed (GDPO, 2601.05242).

        A_i = whiten( Σ_m ω_m·(r_mi - mean_j r_mj)/(std_j r_mj + ε) + (rest_i - mean_j rest_j)/(std_j R_j + ε) )

    ω_m are the weights of the sum, with their signs, and whitening is over the responses of all processes. `Grpo` takes
    the spread of the sum: a reward that varies little there is not heard, and responses with different rewards but
    equal sums are one to it. Here each has its say in every prompt where it varies at all.

    Departure from the paper. Its KL penalty is a term of the loss. Here it is in R, and rest = R - R̂ is what R has
    besides the sum R̂: penalties, and what the objective adds or takes. It is divided by the spread of R, as `Grpo` does
    it. With one reward and no rest this is `Grpo`, whitened.

    Args:
        eps: ε, in the unit of each reward: keeps responses that hardly differ from being blown up.
    """

    def __init__(self, eps: PositiveFloat = 1e-4) -> None:
        check_ranges(Gdpo, locals(), "model.advantage.")
        self.eps = eps

    def check_rewards(self, num_members: int, separate: bool = True, named: Sequence[str] = ()) -> None:
        """Refuse a source of one reward.

        Raises:
            ValueError: Its rewards have no names.
        """
        check_named(self, named)

    def judge(
        self, rewards: Tensor, num_responses: int, all_sum: Reduce, estimate: RewardEstimate | None
    ) -> tuple[Tensor, Tensor | None]:
        """The sum (B,) of what each named reward says, whitened over the batch."""
        said = known(estimate, self)
        columns, weights = named_rewards(said, self)
        each = torch.stack([group_normalise(column, num_responses, self.eps) for column in columns.T], dim=1)
        scale = group_scale(rewards, num_responses, self.eps)
        total = (each * weights).sum(1) + group_centre(rewards - said.mean, num_responses) / scale
        everyone = torch.ones_like(total, dtype=torch.bool)
        over_all = Moments(*(all_sum(x) for x in moments(total, everyone)))
        return masked_whiten(total, everyone, over_all), whitening_scale(over_all) / scale
