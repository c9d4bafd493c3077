"""Which variance an objective is told: the members', the truth, a power of it, or one that is wrong."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor


class Draws(NamedTuple):
    """What one block of repetitions knows of the variance, and the random numbers for spoiling it.

    Attributes:
        members: `(R, n)`, unbiased variance over the members, in units of reward squared.
        true: `(n,)`, variance of the noise of one member, in the same unit.
        normal: `(R, n)`, standard normal numbers.
        order: `(R, n)` int64, a random order of the responses in each repetition.
    """

    members: Tensor
    true: Tensor
    normal: Tensor
    order: Tensor


class ToldVariance(ABC):
    """Turns what is known of the variance into what the objective is told.

    Args:
        exact: Start from the true variance in place of the members'.
    """

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact

    def __call__(self, draws: Draws) -> Tensor:
        """The variance `(R, n)`."""
        start = draws.true.expand_as(draws.members) if self.exact else draws.members
        return self.change(start, draws)

    @abstractmethod
    def change(self, variance: Tensor, draws: Draws) -> Tensor:
        """What is told in place of this variance `(R, n)`."""


class Honest(ToldVariance):
    """The variance as it is.

    Args:
        exact: The true variance in place of the members'.
    """

    def change(self, variance: Tensor, draws: Draws) -> Tensor:
        """The same."""
        return variance


class Power(ToldVariance):
    """The variance to a power: with the scale `reference`, the strength of the term from none (0) to double (2).

    Args:
        strength: s of σ²ˢ. 0 is plain RLHF, 1 the method.
        exact: Start from the true variance in place of the members'.
    """

    def __init__(self, strength: float, exact: bool = False) -> None:
        super().__init__(exact)
        self.strength = strength

    def change(self, variance: Tensor, draws: Draws) -> Tensor:
        """σ²ˢ."""
        return variance**self.strength


class LogNormal(ToldVariance):
    """The variance times exp(spread · N(0, 1)), for each response anew.

    Args:
        spread: Standard deviation of the logarithm: 1 is a factor of e either way.
        exact: Start from the true variance in place of the members'.
    """

    def __init__(self, spread: float, exact: bool = False) -> None:
        super().__init__(exact)
        self.spread = spread

    def change(self, variance: Tensor, draws: Draws) -> Tensor:
        """σ² · exp(spread · z)."""
        return variance * (self.spread * draws.normal).exp()


class Shuffled(ToldVariance):
    """The variances of other responses: right as a set, and worth nothing."""

    def change(self, variance: Tensor, draws: Draws) -> Tensor:
        """The variances in the drawn order."""
        return variance.gather(1, draws.order)


class Constant(ToldVariance):
    """The same variance for every response, their mean."""

    def change(self, variance: Tensor, draws: Draws) -> Tensor:
        """The mean of each row."""
        return variance.mean(1, keepdim=True).expand_as(variance)


class Inverted(ToldVariance):
    """Dear where the members agree and cheap where they do not: 1 / σ²."""

    def change(self, variance: Tensor, draws: Draws) -> Tensor:
        """1 / σ²."""
        return 1 / variance.clamp_min(1e-12)


class Understated(ToldVariance):
    """Too small by a factor on the responses with the most noise, as where all members extrapolate alike.

    Args:
        share: Share of the responses that are so, those with the largest true variance.
        factor: What their variance is multiplied by, in [0, 1].
        exact: Start from the true variance in place of the members'.
    """

    def __init__(self, share: float = 0.3, factor: float = 0.01, exact: bool = False) -> None:
        super().__init__(exact)
        self.share = share
        self.factor = factor

    def change(self, variance: Tensor, draws: Draws) -> Tensor:
        """σ² · factor on the chosen responses."""
        outside = draws.true.argsort(descending=True)[: round(self.share * len(draws.true))]
        scale = torch.ones_like(draws.true)
        scale[outside] = self.factor
        return variance * scale
