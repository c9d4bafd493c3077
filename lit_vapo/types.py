"""The small contracts that every floor of the package shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor


class RewardEstimate(NamedTuple):
    """What an ensemble of reward models says about each response.

    Attributes:
        mean: `(B,)`, mean score over the members, in units of reward.
        variance: `(B,)`, unbiased variance over the members (ddof 1), in units of reward squared.
        members: `(B, K)`, each member's score, or None where the estimator has no discrete members.
    """

    mean: Tensor
    variance: Tensor
    members: Tensor | None


class TokenSequence(NamedTuple):
    """Prompt and response as one list of token ids.

    Attributes:
        ids: L token ids.
        prompt_length: how many of them are the prompt.
    """

    ids: list[int]
    prompt_length: int


class TextReward(ABC):
    """A reward computed from text, e.g. a gold judge."""

    @abstractmethod
    def __call__(self, prompts: list[str], responses: list[str]) -> Tensor:
        """Score each response to its prompt.

        Args:
            prompts: B prompts.
            responses: B responses, one for each prompt.

        Returns:
            `(B,)`, one score for each pair; higher is better.
        """
