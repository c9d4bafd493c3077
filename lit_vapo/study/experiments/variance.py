"""Which variance an objective is told: the members', the truth, a power of it, or one that is wrong."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lit_vapo.functional import fit_variance_prior, moderated_variance, shrinkage
from lit_vapo.objectives.base import Objective, Score
from lit_vapo.stages.seeding import seeded
from lit_vapo.types import RewardEstimate


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


class Moderated(ToldVariance):
    """The variance shrunk to the typical one of its row, as `RewardHead.moderated` shrinks it to the reference's.

    Args:
        members: K, whose variance it is.
    """

    def __init__(self, members: int) -> None:
        super().__init__()
        self.members = members

    def change(self, variance: Tensor, draws: Draws) -> Tensor:
        """Each row by what its own variances are like."""
        degrees = self.members - 1
        priors = [fit_variance_prior(row, degrees) for row in variance]
        shares = [shrinkage(degrees, prior) for prior in priors]
        rows = zip(variance, priors, shares, strict=True)
        return torch.stack([moderated_variance(row, prior.typical, share) for row, prior, share in rows])


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


class Told(Objective):
    """An objective that is told a changed variance of each response, in training and evaluation.

    What is changed is σ² in units of its mean over the reference's responses, so that a power of it stays of order one;
    its own mean is not made one again. The members' variance stands for the true one, which PPO does not know. Chance
    comes from a seed of its own: the responses that are sampled are those of the objective alone.

    Args:
        objective: What is maximised.
        variance: Which variance it is told.
    """

    needs_variance = True

    def __init__(self, objective: Objective, variance: ToldVariance) -> None:
        super().__init__()
        if not objective.needs_variance:
            raise ValueError(f"objective: expected one that uses the variance, got {type(objective).__name__}")
        if variance.exact:
            raise ValueError("variance.exact: expected false, as PPO knows no true variance; got true")
        self.objective = objective
        self.variance = variance
        self.needs_members = objective.needs_members

    def prepare(self, num_members: int) -> None:
        """The objective meets the ensemble as it is."""
        super().prepare(num_members)
        self.objective.prepare(num_members)

    def check_members(self, num_members: int, separate: bool = True) -> None:
        """Refuse what the objective refuses, and a single member."""
        super().check_members(num_members, separate)
        self.objective.check_members(num_members, separate)

    def check_responses(self, num_responses: int) -> None:
        """Refuse what the objective refuses."""
        self.objective.check_responses(num_responses)

    def price(self, kl_coef: Tensor) -> None:
        """Let the objective know β."""
        self.objective.price(kl_coef)

    def forward(self, estimate: RewardEstimate) -> Score:
        """Score B responses as the objective does that is told another variance."""
        return self.objective(self._change(estimate))

    def observe(
        self, estimate: RewardEstimate, log_ratio: Tensor, num_responses: int, all_sum: Callable[[Tensor], Tensor]
    ) -> Score:
        """Score the responses of a training rollout, and learn from them."""
        return self.objective.observe(self._change(estimate), log_ratio, num_responses, all_sum)

    def statistics(self) -> dict[str, Tensor]:
        """What the objective logs."""
        return self.objective.statistics()

    def _change(self, estimate: RewardEstimate) -> RewardEstimate:
        assert estimate.reference_variance is not None, "an ensemble that PPO aligns against is calibrated"
        unit = estimate.reference_variance.clamp_min(1e-12)
        there = estimate.variance / unit
        with seeded(0):
            normal, order = torch.randn(len(there)).to(there), torch.randperm(len(there)).to(there.device)
        told = self.variance(Draws(there[None], there, normal[None], order[None]))[0]
        return estimate._replace(variance=told * unit)
