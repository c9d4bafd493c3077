"""Group-relative advantages."""

from __future__ import annotations

from torch import Tensor

from lit_vapo.advantages.base import GroupBaseline
from lit_vapo.functional import group_normalise, group_scale
from lit_vapo.ranges import PositiveFloat, check_ranges


class Grpo(GroupBaseline):
    """A response's reward in standard deviations of its prompt's responses (Shao et al., arXiv 2402.03300, §4.1.2).

        A_i = (R_i - mean_j R_j) / (std_j R_j + ε),    R = score - β * w * log(π/π0)

    Departures from the paper. Its KL penalty is a term of the loss (k3 of each token, no weight) and no part of R. Here
    it is in the reward, as for every estimator of this project, since only there does a weight w give the gradient of
    the weighted divergence; mean and standard deviation then include it, and score and penalty are divided alike, so
    that β stays a price in units of reward. Its loss averages over the tokens of each response first; here all tokens
    count alike, whatever the length of their response. It leaves ddof and ε open.

    Args:
        eps: ε, in units of reward: keeps responses that hardly differ from being blown up.
    """

    def __init__(self, eps: PositiveFloat = 1e-4) -> None:
        check_ranges(Grpo, locals(), "model.advantage.")
        self.eps = eps

    def compare(self, rewards: Tensor, num_responses: int) -> Tensor:
        """Rewards (B,), centred and scaled within each prompt."""
        return group_normalise(rewards, num_responses, self.eps)

    def scale(self, rewards: Tensor, num_responses: int) -> Tensor:
        """One over the standard deviation of each prompt's rewards, plus ε (B,)."""
        return 1 / group_scale(rewards, num_responses, self.eps)
