"""The entropic reward: what an adversary leaves who pays c for each nat that members are reweighted by (2606.09073)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_vapo.functional import soft_minimum
from lit_vapo.objectives.base import Objective, Score, all_members, ones_like_mean
from lit_vapo.ranges import PositiveFloat, check_ranges
from lit_vapo.types import RewardEstimate


class Entropic(Objective):
    """Reward −c·log mean_k exp(−r_k/c) − β·KL (the pessimistic reward of Hahami et al. 2606.09073, where c = β).

    Three objectives are its limits: c → ∞ is `MeanReward`, c → 0 is `WorstCase`, and where members differ by little
    next to c it is `UncertaintyWeighted` with λ = (K − 1)/(2cK). The reward lies between the least member and c·log K
    above it, so few members see little of a tail. Form `gaussian` takes members for draws from a normal distribution,
    whose tail is known:

        mean_k r_k − σ²/(2c)

    which is `UncertaintyWeighted` with λ = 1/(2c). It has no floor, and punishes the largest σ² hardest.

    With `tied`, c = `temperature`·β, as in the paper for `temperature` 1. β is told before each iteration. Where
    `model.kl_target` adapts β, the objective follows: a smaller β buys more KL and more pessimism at once, so the
    reward moves although the responses do not. At the usual β of 0.01 to 0.1 standard deviations a nat, `members` is
    all but `WorstCase`, and `gaussian` has λ = 5 to 50. Without `tied`, pessimism stays what it is, whatever β does.

    Args:
        temperature: c, in units of reward; with `tied` in units of β.
        form: `members`, or `gaussian` for few members or a source without separate ones.
        tied: c follows β.

    Raises:
        ValueError: `temperature` is not positive.
    """

    needs_variance = True
    coef: Tensor

    def __init__(
        self,
        temperature: PositiveFloat = 1.0,
        form: Literal["members", "gaussian"] = "members",
        tied: bool = False,
    ) -> None:
        super().__init__()
        check_ranges(Entropic, locals())
        self.temperature = temperature
        self.form = form
        self.tied = tied
        self.needs_members = form == "members"
        # β as it was last told, 0 before: an evaluation of a checkpoint judges as the run did.
        self.register_buffer("coef", torch.zeros(()))

    def price(self, kl_coef: Tensor) -> None:
        """Take β.

        Raises:
            ValueError: c is tied to a β of 0.
        """
        if self.tied and not float(kl_coef) > 0:
            raise ValueError(
                f"Entropic with tied: expected model.kl_coef above 0, got {float(kl_coef):g}; leave `tied` out for a "
                "pessimism that does not depend on it"
            )
        self.coef.copy_(kl_coef)

    def forward(self, estimate: RewardEstimate) -> Score:
        """Score B responses by the entropic mean of their members.

        Raises:
            ValueError: c is tied to β, and nobody has told it.
        """
        c = self.temperature * float(self.coef) if self.tied else self.temperature
        if c == 0:
            raise ValueError("Entropic with tied: expected to be told β first (`price`), as PPO does, got none")
        if self.form == "gaussian":
            return Score(estimate.mean - estimate.variance / (2 * c), ones_like_mean(estimate))
        return Score(soft_minimum(all_members(estimate, self), c), ones_like_mean(estimate))
