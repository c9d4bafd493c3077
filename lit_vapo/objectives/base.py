"""The contract of all objectives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_vapo.types import RewardEstimate


class Score(NamedTuple):
    """What an objective makes of an ensemble's estimate.

    Attributes:
        reward: Reward added at the last response token (B,).
        kl_weight: Weight w of the KL penalty of each response (B,), >= 0.
    """

    reward: Tensor
    kl_weight: Tensor


class Objective(nn.Module, ABC):
    """Turns an ensemble's estimate into a terminal reward and a weight of the KL penalty.

    PPO then maximises the reward less β·w·Σ_t (log π(a_t) − log π0(a_t)) of each response. A subclass gives `forward`;
    if it uses the variance it sets `needs_variance`, and a single-member ensemble is refused for it; if it uses each
    member it sets `needs_members`.

    Most objectives judge each response by itself, and `forward` is all of them. One that judges a response by what
    else the policy does gives `observe` too, keeps what it learns there in buffers (checkpoints hold them), and
    may log it by `statistics`. Training calls `observe` once for each rollout and uses its score; evaluation calls
    `forward`, which changes nothing.
    """

    needs_variance: bool = False
    needs_members: bool = False

    def prepare(self, num_members: int) -> None:
        """Make room for what depends on the number of members, once, before training.

        Args:
            num_members: Number of members K.

        Raises:
            ValueError: The objective needs a variance and K < 2.
        """
        self.check_members(num_members)

    def check_members(self, num_members: int, separate: bool = True) -> None:
        """Refuse a source of rewards that this objective cannot use, before anything is loaded.

        Args:
            num_members: Number of members K behind each estimate.
            separate: Whether the estimates have them one by one.

        Raises:
            ValueError: The objective needs a variance and K < 2, or it needs members and there are none.
        """
        name = type(self).__name__
        if self.needs_variance and num_members < 2:
            raise ValueError(
                f"objective {name} needs the variance of an ensemble: expected at least 2 members, got {num_members}. "
                "Train the ensemble with model.head.init_args.num_members of 2 or more, or take several reward models "
                "(docs/rewards.md)."
            )
        if self.needs_members and not separate:
            raise ValueError(
                f"objective {name} looks at each member: expected a source of rewards with separate members, got one "
                "without. A sum has them with `aligned: true`."
            )

    def check_responses(self, num_responses: int) -> None:
        """Refuse a number of responses to each prompt that this objective cannot use.

        Raises:
            ValueError: It needs more.
        """
        return

    def price(self, kl_coef: Tensor) -> None:
        """Take β (), the price of a nat; told before each iteration, for objectives whose reward depends on it.

        Raises:
            ValueError: The objective cannot be used at this price.
        """
        return

    @abstractmethod
    def forward(self, estimate: RewardEstimate) -> Score:
        """Score an estimate of B responses, and change nothing."""

    def observe(
        self, estimate: RewardEstimate, log_ratio: Tensor, num_responses: int, all_sum: Callable[[Tensor], Tensor]
    ) -> Score:
        """Score the responses of a training rollout, and learn from them what later ones are judged by.

        Args:
            estimate: The estimate of B responses; those to one prompt stand together, row i·n + j is response j to
                prompt i.
            log_ratio: Log π(y)/π0(y) of each response (B,).
            num_responses: Responses n to each prompt.
            all_sum: Sums a tensor over all processes, so that each learns from the whole batch.
        """
        return self(estimate)

    def statistics(self) -> dict[str, Tensor]:
        """What to log about the last training rollout as `train/…`: scalars, each defined in docs/metrics.md."""
        return {}


def ones_like_mean(estimate: RewardEstimate) -> Tensor:
    """The weight of plain RLHF: one for every response (B,)."""
    return torch.ones_like(estimate.mean)


def all_members(estimate: RewardEstimate, objective: Objective) -> Tensor:
    """Rewards of all members (B, K).

    Raises:
        ValueError: The estimator has no separate members.
    """
    if estimate.members is None:
        raise ValueError(
            f"{type(objective).__name__}: expected an ensemble with separate members, got an estimate without them"
        )
    return estimate.members
