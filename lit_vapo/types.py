"""The small contracts that every floor of the package shares."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

# Role and content, and whatever else a chat template may read (tool_calls, name, reasoning_content …).
Message = dict[str, Any]
Messages = list[Message]


class RewardEstimate(NamedTuple):
    """What a source of rewards says about each response.

    Attributes:
        mean: `(B,)`, mean score over the members, in units of reward.
        variance: `(B,)`, unbiased variance over the members (ddof 1), moderated if the ensemble is, in units of
            reward squared; 0 for a single member, which cannot tell.
        members: `(B, K)`, each member's score, or None where the source has no discrete members.
        reference_variance: `()`, mean of the variance over responses of the reference policy, in units of reward
            squared: the unit in which a variance is large or small. None where nobody has measured it.
        parts: The estimates that this one was made of, by name, or None.
        applies: `(B,)` bool, whether there is a reward at all; mean and variance are 0 where there is none, which only
            another source in a sum can make up for. None where all responses have one.
        weights: By how much each part counts in a sum of them, by name, or None.
        features: `(B, H)`, what members read of each response, or None where nobody can tell.
        aleatoric: `(B,)`, variance of what people say of each response about its reward, in units of reward squared:
            noise of labels, which no ensemble takes away. None where nobody has told it apart.
    """

    mean: Tensor
    variance: Tensor
    members: Tensor | None
    reference_variance: Tensor | None = None
    parts: dict[str, RewardEstimate] | None = None
    applies: Tensor | None = None
    weights: dict[str, float] | None = None
    features: Tensor | None = None
    aleatoric: Tensor | None = None

    @property
    def missing(self) -> Tensor:
        """`(B,)` bool, which responses have no reward, or one that is not finite."""
        bad = ~self.mean.isfinite()
        return bad if self.applies is None else bad | ~self.applies

    @property
    def sigma(self) -> Tensor:
        """`(B,)`, standard deviation over the members, in units of reward."""
        # Rounding may leave a variance of zero a little below it.
        return self.variance.clamp_min(0).sqrt()


class PairLabels(NamedTuple):
    """What is known of pairs of responses besides the responses.

    Attributes:
        margin: `(B,)`, by how much the preference was stated, in units of reward; 0 where nobody said.
        probability: `(B,)`, probability that the chosen response is the better one, in [0.5, 1]: 1 for a plain
            preference, 0.5 for a tie, between them where annotators did not agree.
        weight: `(B,)`, how often the pair counts, >= 0.
        example_ids: `(B,)` int64, stable identity of each pair.
        counts: `(B,)` bool, False where a pair only stands in to give every process as many; None where all count.
    """

    margin: Tensor
    probability: Tensor
    weight: Tensor
    example_ids: Tensor
    counts: Tensor | None = None

    def select(self, index: Tensor) -> PairLabels:
        """Those of some pairs."""
        return PairLabels(*(None if column is None else column[index] for column in self))  # type: ignore[arg-type]


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


@dataclass(frozen=True)
class Prompt:
    """What is to be answered.

    Attributes:
        content: A text, or messages, at least one. After messages that end with the assistant's the response goes on
            with that message; after any other it is a message of its own.
        tools: JSON schemas of functions that the assistant may call, for the chat template; messages only.
    """

    content: str | Messages
    tools: list[dict[str, Any]] | None = None

    @property
    def identity(self) -> str:
        """What the row says, in one text that no template, tokenizer or day changes."""
        if isinstance(self.content, str):
            return self.content
        return json.dumps(
            [self.content, self.tools] if self.tools else self.content, sort_keys=True, ensure_ascii=False
        )


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
