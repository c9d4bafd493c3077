"""Advantages by a soft minimum over members or named rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_vapo.advantages.base import Reduce, WholeResponses, check_named, known, named_rewards
from lit_vapo.functional import group_centre, group_normalise, group_scale, soft_minimum
from lit_vapo.ranges import PositiveFloat, check_ranges
from lit_vapo.types import RewardEstimate


class Rvpo(WholeResponses):
    """What a response does worst at counts most: a soft minimum over normalised rewards (RVPO, 2605.05750).

        A_i = softmin_m z_mi - mean_j softmin_m z_mj,    softmin_m z = -1/κ · log Σ_m ω_m·exp(-κ·z_m)

    κ → 0 is the weighted mean of the z, κ → ∞ the least of them; between, it is the mean less κ/2 times their variance,
    to second order.

    Over `members`, ω = 1/K and z_k is what `Grpo` makes of the reward R_k = R + r_k - R̂ that member k alone would have
    given, penalties included: a response is good if the whole ensemble thinks so. Equal members give `Grpo`.

    Over `rewards`, those of a `WeightedSum`, z_m is each reward in standard deviations of its prompt, turned round if
    its weight is negative, and ω are the weights, as shares. They have units of their own, so what R has besides the
    sum (rest = R - R̂: penalties, and what the objective adds or takes) is centred, divided by the spread of R as `Grpo`
    does it, and added.

    Departures from the paper. A soft minimum is at most the mean, so all responses to a prompt that its rewards dispute
    would be pushed down together; the mean over the prompt is taken off, which leaves the expected gradient as it is
    but for the share of each response in its own baseline. And its KL penalty is a term of the loss; here it is in R.
    An objective that is pessimistic too doubts twice.

    Args:
        over: `members`, or the named `rewards` of a sum.
        sharpness: κ, in 1/standard deviations of a prompt's responses.
        eps: ε, in the unit of each reward.
    """

    def __init__(
        self,
        over: Literal["members", "rewards"] = "members",
        sharpness: PositiveFloat = 1.0,
        eps: PositiveFloat = 1e-4,
    ) -> None:
        check_ranges(Rvpo, locals(), "model.advantage.")
        self.over = over
        self.sharpness = sharpness
        self.eps = eps

    def check_rewards(self, num_members: int, separate: bool = True, named: Sequence[str] = ()) -> None:
        """Refuse a source without what the minimum is taken over.

        Raises:
            ValueError: It has no separate members, or its rewards have no names.
        """
        if self.over == "rewards":
            check_named(self, named)
        elif num_members < 2 or not separate:
            raise ValueError(
                "model.advantage: Rvpo over members: expected a source with at least 2 separate members, got "
                + (f"{num_members}" if separate else "one without. A sum has them with `aligned: true`")
            )

    def judge(
        self, rewards: Tensor, num_responses: int, all_sum: Reduce, estimate: RewardEstimate | None
    ) -> tuple[Tensor, Tensor | None]:
        """Soft minima (B,), centred within each prompt."""
        said = known(estimate, self)
        rest = rewards - said.mean
        if self.over == "rewards":
            columns, weights = named_rewards(said, self)
            scale = group_scale(rewards, num_responses, self.eps)
            least, _ = self._least(columns, weights / weights.sum(), num_responses)
            return least + group_centre(rest, num_responses) / scale, 1 / scale
        if said.members is None:
            raise ValueError("Rvpo: expected an estimate with separate members, got one without")
        return self._least(said.members + rest[:, None], None, num_responses)

    def _least(self, columns: Tensor, weights: Tensor | None, num_responses: int) -> tuple[Tensor, Tensor]:
        """Soft minima of normalised columns (B, M), centred, and what a unit that all columns have is in them."""
        each = torch.stack([group_normalise(column, num_responses, self.eps) for column in columns.T], dim=1)
        scales = torch.stack([group_scale(column, num_responses, self.eps) for column in columns.T], dim=1)
        share = (-self.sharpness * each + (0 if weights is None else weights.log())).softmax(1)
        return group_centre(soft_minimum(each, 1 / self.sharpness, weights), num_responses), (share / scales).sum(1)
