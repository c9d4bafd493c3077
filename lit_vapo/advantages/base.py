"""The contract of all estimators of the advantage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
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

    def check_rewards(self, num_members: int, separate: bool = True, named: Sequence[str] = ()) -> None:
        """Refuse a source of rewards that this estimator cannot use, before anything is loaded.

        Args:
            num_members: Number of members K behind each estimate.
            separate: Whether the estimates have them one by one.
            named: Names of the rewards that an estimate is a sum of, as far as they count; none if it is no sum.

        Raises:
            ValueError: The estimator looks at something that the source does not have.
        """
        return

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
            estimate: What the source of rewards said of each response (mean, variance, members, and the named parts of
                a sum), before the objective made a reward of it; for estimators that weigh responses by how much is
                known of them.

        Returns:
            Advantages (B, T), zeros outside the mask; returns are `None` without a critic. An estimator that scales
            says so in `scale`: what a token alone hears of is added in the same unit (`functional.own_penalty`).
        """


class WholeResponses(AdvantageEstimator):
    """Compares whole responses to one prompt with each other; no critic.

    The reward of a response is the sum over its tokens, R = score − β·w·log(π/π0), so the weighted KL penalty is part
    of what is compared. Every token of a response has the same advantage. A subclass gives `judge`, which sees the
    source's estimate too; one that needs the rewards alone is a `GroupBaseline`.
    """

    min_responses = 2

    @abstractmethod
    def judge(
        self, rewards: Tensor, num_responses: int, all_sum: Reduce, estimate: RewardEstimate | None
    ) -> tuple[Tensor, Tensor | None]:
        """Advantages of responses (B,), and what a unit of R is in them (B,), `None` for 1.

        Args:
            rewards: R of each response (B,), n rows a prompt.
            num_responses: Responses n to each prompt.
            all_sum: Sum of a tensor over all processes.
            estimate: What the source of rewards said of them, if it was asked.
        """

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
        judged, scale = self.judge(masked_sum(rewards, response_mask, dim=1), num_responses, all_sum, estimate)
        return Advantages(on_every_token(judged, response_mask), None, None if scale is None else scale[:, None])


class GroupBaseline(WholeResponses):
    """The same from the rewards alone. A subclass gives `compare`, and `scale` if it scales."""

    @abstractmethod
    def compare(self, rewards: Tensor, num_responses: int) -> Tensor:
        """Advantages of responses (B,) from their rewards (B,), n rows a prompt."""

    def scale(self, rewards: Tensor, num_responses: int) -> Tensor | None:
        """What a unit of reward is in the advantages of responses (B,), or `None` for 1."""
        return None

    def judge(
        self, rewards: Tensor, num_responses: int, all_sum: Reduce, estimate: RewardEstimate | None
    ) -> tuple[Tensor, Tensor | None]:
        """Compare the rewards."""
        return self.compare(rewards, num_responses), self.scale(rewards, num_responses)


def known(estimate: RewardEstimate | None, who: AdvantageEstimator) -> RewardEstimate:
    """The estimate, for those who cannot do without.

    Raises:
        ValueError: There is none.
    """
    if estimate is None:
        raise ValueError(f"{type(who).__name__}: expected the estimate of the source of rewards, got None")
    return estimate


def named_rewards(estimate: RewardEstimate, who: AdvantageEstimator) -> tuple[Tensor, Tensor]:
    """What a sum of rewards is made of: each named reward, turned so that more of it is better, and its weight.

    Rewards of weight 0, which a sum only logs, are left out.

    Returns:
        Rewards (B, M), each in its own unit, and the absolute values of their weights (M,).

    Raises:
        ValueError: The estimate is no sum.
    """
    if not estimate.parts or not estimate.weights:
        raise ValueError(f"{type(who).__name__}: expected an estimate with named rewards, got one without")
    weights = {name: weight for name, weight in estimate.weights.items() if weight}
    signed = [estimate.parts[name].mean * (1 if weight > 0 else -1) for name, weight in weights.items()]
    columns = torch.stack(signed, dim=1)
    return columns, columns.new_tensor([abs(weight) for weight in weights.values()])


def check_named(who: AdvantageEstimator, named: Sequence[str]) -> None:
    """Refuse a source whose rewards have no names.

    Raises:
        ValueError: It is no sum.
    """
    if not named:
        raise ValueError(
            f"model.advantage: {type(who).__name__} compares named rewards: expected a WeightedSum as model.reward, "
            "got a source of one reward"
        )
