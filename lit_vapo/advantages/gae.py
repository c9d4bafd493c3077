"""Generalised advantage estimation."""

from __future__ import annotations

from torch import Tensor

from lit_vapo.advantages.base import AdvantageEstimator, Reduce
from lit_vapo.functional import Advantages, Moments, gae, masked_whiten, moments, whitening_scale
from lit_vapo.ranges import ClosedUnitInterval, check_ranges
from lit_vapo.types import RewardEstimate


class Gae(AdvantageEstimator):
    """Generalised advantage estimates from a critic's values (Schulman et al., arXiv 1506.02438, equation 16).

    Args:
        gamma: Discount γ, from 0 to 1.
        gae_lambda: λ, from 0 (TD errors) to 1 (reward to go minus value).
        whiten: Centre and scale the advantages over all response tokens of all processes.
    """

    needs_critic = True

    def __init__(
        self, gamma: ClosedUnitInterval = 1.0, gae_lambda: ClosedUnitInterval = 0.95, whiten: bool = True
    ) -> None:
        check_ranges(Gae, locals(), "model.advantage.")
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.whiten = whiten

    def __call__(
        self,
        rewards: Tensor,
        values: Tensor | None,
        response_mask: Tensor,
        num_responses: int,
        all_sum: Reduce,
        estimate: RewardEstimate | None = None,
    ) -> Advantages:
        """Advantages, whitened if asked, and returns that are not."""
        if values is None:
            raise ValueError("Gae: expected the values of a critic, got None")
        advantages, returns, _ = gae(rewards, values, response_mask, self.gamma, self.gae_lambda)
        if not self.whiten:
            return Advantages(advantages, returns)
        total = Moments(*(all_sum(x) for x in moments(advantages, response_mask)))
        return Advantages(masked_whiten(advantages, response_mask, total), returns, whitening_scale(total))
