"""REINFORCE with a leave-one-out baseline."""

from __future__ import annotations

from torch import Tensor

from lit_vapo.advantages.base import GroupBaseline
from lit_vapo.functional import leave_one_out


class Rloo(GroupBaseline):
    """A response against the mean of the others to its prompt (Ahmadian et al., arXiv 2402.14740).

        A_i = R_i - 1/(n-1) * Σ_{j≠i} R_j,    R = score - β * w * log(π/π0)

    Unbiased: a response's baseline does not depend on it. Departures from the paper: its penalty has w = 1; it takes
    one step of REINFORCE on a batch, which is what the first minibatch here does (up to the division of the loss by
    tokens), while later ones have PPO's clipped ratios of tokens.
    """

    def compare(self, rewards: Tensor, num_responses: int) -> Tensor:
        """Rewards (B,) less those of the other responses to the prompt."""
        return leave_one_out(rewards, num_responses)
