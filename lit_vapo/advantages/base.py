"""The contract of all estimators of the advantage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from lit_vapo.functional import Advantages, masked_sum, on_every_token
from lit_vapo.types import RewardEstimate

Reduce = Callable[[Tensor], Tensor]


class AdvantageEstimator(ABC):
    """Turns the rewards of tokens into advantages, and into targets of a critic if it needs one.

    PPO builds a critic for an estimator with `needs_critic` and none for the others. An estimator that compares the
    responses of a prompt says how many it needs in `min_responses`; a run with fewer is refused before anything is
    loaded.
    """

    needs_critic: bool = False
    min_responses: int = 1

    def check_responses(self, num_responses: int) -> None:
        """Refuse too few responses to a prompt.

        Raises:
            ValueError: Fewer than `min_responses`.
        """
        if num_responses < self.min_responses:
            raise ValueError(
                f"model.sampling.num_responses: expected at least {self.min_responses}, since "
                f"{type(self).__name__} compares the responses to a prompt with each other, got {num_responses}"
            )

    @abstractmethod
    def __call__(
        self,
        rewards: Tensor,
        values: Tensor | None,
        response_mask: Tensor,
        num_responses: int,
        all_sum: Reduce,
        estimate: RewardEstimate | None = None,
    ) -> Advantages:
        """Estimate the advantages of B responses of up to T tokens.

        Args:
            rewards: Reward of each token (B, T), from `functional.token_rewards`; a row sums to the score less the
                weighted KL penalty. The rows of a prompt stand together: row i·n + j is response j to prompt i.
            values: Values before each token (B, T), or `None` without a critic.
            response_mask: bool (B, T), True = counts.
            num_responses: Responses n to each prompt.
            all_sum: Sum of a tensor over all processes.
            estimate: What the source of rewards said of each response (mean, variance, members), before the objective
                made a reward of it; for estimators that weigh responses by how much is known of them.

        Returns:
            Advantages (B, T), zeros outside the mask; returns are `None` without a critic.
        """


class GroupBaseline(AdvantageEstimator):
    """Compares whole responses to one prompt with each other; no critic.

    The reward of a response is the sum over its tokens, R = score − β·w·log(π/π0), so the weighted KL penalty is part
    of what is compared. Every token of a response has the same advantage. A subclass gives `compare`.
    """

    min_responses = 2

    @abstractmethod
    def compare(self, rewards: Tensor, num_responses: int) -> Tensor:
        """Advantages of responses (B,) from their rewards (B,), n rows a prompt."""

    def __call__(
        self,
        rewards: Tensor,
        values: Tensor | None,
        response_mask: Tensor,
        num_responses: int,
        all_sum: Reduce,
        estimate: RewardEstimate | None = None,
    ) -> Advantages:
        """Sum the rewards of tokens, compare, and give every token its response's advantage."""
        self.check_responses(num_responses)
        compared = self.compare(masked_sum(rewards, response_mask, dim=1), num_responses)
        return Advantages(on_every_token(compared, response_mask), None)
