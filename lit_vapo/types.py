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


class PairLabels(NamedTuple):
    """What is known of pairs of responses besides the responses.

    Attributes:
        margin: `(B,)`, by how much the preference was stated, in units of reward; 0 where nobody said.
        probability: `(B,)`, probability that the chosen response is the better one, in [0.5, 1]: 1 for a plain
            preference, 0.5 for a tie, between them where annotators did not agree.
        weight: `(B,)`, how often the pair counts, >= 0.
        example_ids: `(B,)` int64, stable identity of each pair.
    """

    margin: Tensor
    probability: Tensor
    weight: Tensor
    example_ids: Tensor


class FeaturePairs(NamedTuple):
    """Pairs of responses as features, with what is known of them.

    Attributes:
        chosen: Features of the preferred responses (B, H), or (B, K, H) where members differ in them.
        rejected: Features of the others, of the same shape.
        labels: What else is known of each pair.
    """

    chosen: Tensor
    rejected: Tensor
    labels: PairLabels


class Adapter(NamedTuple):
    """One member's low-rank adapters and its head.

    Attributes:
        rank: Rank r.
        alpha: The update is scaled by alpha / rank.
        weights: Name of a layer in the backbone -> A `(r, in)` and B `(out, r)`; the layer's update is B·A.
        score: `(H,)`, weight of the reward head.
    """

    rank: int
    alpha: float
    weights: dict[str, tuple[Tensor, Tensor]]
    score: Tensor


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
