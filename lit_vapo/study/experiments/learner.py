"""How the ensembles of a study learn from few preferences, some of them stated the wrong way round."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_vapo.functional import spearman
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.stages.schedule import linear_decay
from lit_vapo.stages.seeding import seeded
from lit_vapo.study.experiment import expect, settings_grid
from lit_vapo.types import FeaturePairs, PairLabels


def preference_settings(pairs: list[int], flipped: list[float]) -> dict[str, dict[str, Any]]:
    """Settings: all combinations of the lists.

    Args:
        pairs: Numbers of preferences.
        flipped: Probabilities that one is stated the wrong way round, in [0, 0.5].

    Raises:
        ValueError: A number is out of its range.
    """
    expect("pairs", pairs, all(n >= 1 for n in pairs), "numbers of at least 1")
    expect("flipped", flipped, all(0 <= p <= 0.5 for p in flipped), "probabilities in [0, 0.5]")
    return settings_grid(pairs=pairs, flipped=flipped)


def draw_stated(chosen: Tensor, rejected: Tensor, pairs: int, flipped: float, seed: int) -> FeaturePairs:
    """Some of the preferences there are, none twice, some stated the wrong way round.

    Args:
        chosen: Features (M, H) of the better response of each preference there is.
        rejected: Of the other.
        pairs: How many to draw.
        flipped: Probability that one is stated the wrong way round.
        seed: Where the chance comes from.

    Raises:
        ValueError: There are fewer.
    """
    expect("pairs", pairs, pairs <= len(chosen), f"at most the {len(chosen)} there are")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(chosen), generator=generator)[:pairs]
    return state_pairs(chosen[drawn], rejected[drawn], flipped, generator)


def state_pairs(better: Tensor, worse: Tensor, flipped: float, generator: torch.Generator) -> FeaturePairs:
    """Preferences between responses, some stated the wrong way round.

    Args:
        better: Features (N, H) of the better response of each pair.
        worse: Of the other.
        flipped: Probability that a preference is stated the wrong way round.
        generator: Where the chance comes from.
    """
    count = len(better)
    wrong = (torch.rand(count, generator=generator) < flipped)[:, None]
    ones = torch.ones(count)
    labels = PairLabels(torch.zeros(count), ones, ones, torch.arange(count))
    return FeaturePairs(torch.where(wrong, worse, better), torch.where(wrong, better, worse), labels)


@dataclass(frozen=True)
class Learner:
    """Makes a new ensemble of one kind from preferences.

    Args:
        head: The estimator; its seed is the repetition's.
        steps: Steps of its optimiser, each on all pairs.
        learning_rate: Its first learning rate (AdamW, linear decay, as in the reward stage).
    """

    head: RewardHead
    steps: int
    learning_rate: float

    def __post_init__(self) -> None:
        expect("steps", self.steps, self.steps >= 1, "at least 1")
        expect("head_learning_rate", self.learning_rate, self.learning_rate > 0, "a number > 0")

    def learn(self, pairs: FeaturePairs, reference: Tensor, seed: int) -> RewardHead:
        """A new ensemble, calibrated.

        Args:
            pairs: What it learns from.
            reference: Features (N, H) of responses of the reference, to calibrate it on.
            seed: Where its initialisation and bootstrap come from.
        """
        head = copy.deepcopy(self.head)
        head.seed = seed
        with seeded(seed):  # for estimators that draw from the common generator
            head.build(reference.shape[1])
            optimizer = torch.optim.AdamW(head.parameters(), lr=self.learning_rate, weight_decay=0.01)
            decay = torch.optim.lr_scheduler.LambdaLR(optimizer, linear_decay(self.steps))
            for _ in range(self.steps):
                optimizer.zero_grad()
                head.loss(*pairs).backward()
                optimizer.step()
                decay.step()
            head.settle([pairs])
        head.requires_grad_(False).calibrate(reference)
        return head


def examine(mean: Tensor, variance: Tensor, true: Tensor) -> dict[str, float]:
    """How good the rewards of an ensemble are, and whether its σ tells where they err.

    Rewards and truth are taken less their means over the responses to a prompt, since a policy chooses between these,
    each in standard deviations of what is left; the error is their difference. σ is compared between all responses: a
    weight decides how far to go on one prompt rather than on another, too. A variance-aware objective needs a σ that
    differs between responses and is large where the error is. (With two responses to a prompt both err by the same.)

    Args:
        mean: Mean reward (P, N) of N responses to each of P prompts.
        variance: Variance between members (P, N).
        true: True reward (P, N).

    Returns:
        `correlation` of reward and truth, `sigma_spread` (standard deviation of σ over its mean) and `sigma_error`
        (rank correlation of σ and the absolute error); what is not defined, as for one member, is left out.
    """
    reward, truth = (x.double() - x.double().mean(1, keepdim=True) for x in (mean, true))
    reward, truth = (x / x.square().mean().sqrt() for x in (reward, truth))
    sigma, error = variance.double().sqrt(), (reward - truth).abs()
    found = {"correlation": (reward * truth).mean(), "sigma_spread": sigma.std() / sigma.mean()}
    if bool(torch.isfinite(error).all()):
        found["sigma_error"] = spearman(sigma.flatten(), error.flatten())
    return {name: float(x) for name, x in found.items() if bool(torch.isfinite(x))}
