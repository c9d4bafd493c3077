"""Level 1: one prompt with n responses, where every policy, return and divergence is exact.

Source: Banerjee, Saha, Gopalan, "Towards Reliable, Uncertainty-Aware Alignment", arXiv 2507.15906.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_vapo.functional import bregman_kl, risk_vanilla, risk_variance_aware
from lit_vapo.objectives.base import Objective
from lit_vapo.study.experiment import Experiment, Record, Repetition, expect, settings_grid
from lit_vapo.study.experiments.optimal_course import optimal_course
from lit_vapo.study.experiments.variance import Draws, Honest, ToldVariance
from lit_vapo.types import RewardEstimate

HALVINGS = range(-7, 5)  # of β at the points of a run


@dataclass
class Method:
    """One method of the study.

    Args:
        objective: What the policy maximises, as in PPO.
        told: Which variance the objective is told; the members' own if left out.
    """

    objective: Objective
    told: ToldVariance | None = None


@dataclass
class World:
    """One prompt, its responses and how noisy their rewards are.

    The true rewards are drawn once from N(0, 1). The noise's standard deviations are evenly spaced in the logarithm,
    dealt to the responses at random, and scaled so that their mean square is `noise`²: settings differ in how
    unequal the noise is and not in how much there is of it. The reference is uniform, as in the theory.

    Args:
        responses: n.
        noise: Root mean square over responses of the noise of one member, in standard deviations of the true reward.
    """

    responses: int
    noise: float

    def __post_init__(self) -> None:
        if self.responses < 3 or not self.noise > 0:
            raise ValueError(f"world: expected responses >= 3 and noise > 0, got {self.responses} and {self.noise}")

    def draw(self, number: int, ratio: float, objective: int = 0) -> tuple[Tensor, Tensor]:
        """True rewards `(n,)` and standard deviations of one member's noise `(n,)`, float64.

        Args:
            number: Which world: another draw of the true rewards and of who gets which noise.
            ratio: The largest standard deviation over the smallest, >= 1.
            objective: Which of several objectives: each has rewards and noise of its own.
        """
        rng = _generator(number, objective)
        reward = rng.standard_normal(self.responses)
        sigma = rng.permutation(np.geomspace(1, ratio, self.responses))
        return torch.from_numpy(reward), torch.from_numpy(sigma * self.noise / np.sqrt(np.mean(sigma**2)))


class SmallSteps(Experiment):
    """Small steps along P·R̂ (plain) and M·R̂ (variance-aware), R̂ ~ N(R*, Σ): is the risk what the formulas say?

    Every record carries the formula's risk as `exact_risk`.

    Args:
        noise_ratio: Ratios of the largest noise to the smallest, one setting each.
        worlds: How many draws of true rewards, each a setting with every ratio.
        responses: n, the number of responses.
        noise: Root mean square of the noise of one member, in standard deviations of the true reward.
        kl: Length of the steps: their KL divergence to second order, in nats.
        block_size: Repetitions in one file.
    """

    def __init__(
        self,
        noise_ratio: list[float],
        worlds: int = 1,
        responses: int = 10,
        noise: float = 4.0,
        kl: float = 1e-4,
        block_size: int = 500,
    ) -> None:
        self.world = World(responses, noise)
        self.kl = kl
        self.block_size = block_size
        self.settings = settings_grid(noise_ratio=noise_ratio, world=list(range(worlds)))

    def run_block(self, setting: str, repetitions: Sequence[Repetition]) -> list[Record]:
        """All estimates at once."""
        params = self.settings[setting]
        true, sigma = self.world.draw(params["world"], params["noise_ratio"])
        n = len(true)
        reference = torch.full((n,), 1 / n, dtype=torch.float64)
        z = np.stack([np.random.default_rng(r.seed).standard_normal(n) for r in repetitions])
        estimate = true + torch.from_numpy(z) * sigma
        ways = {
            "small step, plain": (torch.ones_like(sigma), risk_vanilla(true, sigma.square())),
            "small step, variance-aware": (sigma.square(), risk_variance_aware(true, sigma.square())),
        }
        records = []
        for method, (weight, risk) in ways.items():
            centre = (estimate / weight).sum(1, keepdim=True) / (1 / weight).sum()
            step = (estimate - centre) / weight
            # KL(π0 + d ‖ π0) = n/2 · ‖d‖² to second order for a uniform π0.
            step = step * (2 * self.kl / n) ** 0.5 / step.norm(dim=1, keepdim=True)
            gain, kl = step @ true, bregman_kl(reference + step, reference.expand_as(step))
            base = float(reference @ true)
            for i, repetition in enumerate(repetitions):
                at, value, exact = [float(kl[i])], [base + float(gain[i])], {"exact_risk": float(risk)}
                records.append(Record(method, setting, *repetition, at, value, base, exact))
        return records


class Optima(Experiment):
    """The exact optimum of each objective, with reward models that err: R̂_k = R* + noise.

    The noise of member k on response y is σ(y) · (√ρ · common(y) + √(1 − ρ) · own_k(y)), with standard normal draws
    that all methods share. A run's points are the optima at coefficients that fall from 128 β to β/16 by halves. The
    one at β is the final policy, which is compared at equal β.

    Args:
        methods: The methods by name. Their objectives depend on the estimate of each response alone.
        noise_ratio: Ratios of the largest noise to the smallest. Settings are all combinations of the lists.
        members: Numbers of members K, of each objective's ensemble.
        correlation: Shares ρ of the noise's variance that all members have in common, in [0, 1).
        kl_coef: Coefficients β, in units of reward per nat.
        worlds: How many draws of true rewards.
        responses: n, the number of responses.
        noise: Root mean square of the noise of one member, in standard deviations of the true reward.
        block_size: Repetitions in one file.
        objectives: Numbers m of objectives, such as helpful and harmless, that are independent of each other. The true
            reward is their sum over √m; each has an ensemble of its own, and the variances are added in the same way.

    Raises:
        ValueError: No methods, or a list without entries.
    """

    def __init__(
        self,
        methods: dict[str, Method],
        noise_ratio: list[float],
        members: list[int],
        correlation: list[float],
        kl_coef: list[float],
        worlds: int = 1,
        responses: int = 10,
        noise: float = 4.0,
        block_size: int = 500,
        objectives: Sequence[int] = (1,),
    ) -> None:
        expect("methods", "none", bool(methods), "at least one")
        self.methods = methods
        self.world = World(responses, noise)
        self.block_size = block_size
        self.settings = settings_grid(
            noise_ratio=noise_ratio,
            members=members,
            correlation=correlation,
            kl_coef=kl_coef,
            world=list(range(worlds)),
            objectives=list(objectives),
        )
        expect("objectives", objectives, all(m >= 1 for m in objectives), "numbers of at least 1")

    def run_block(self, setting: str, repetitions: Sequence[Repetition]) -> list[Record]:
        """All ensembles at once."""
        params = self.settings[setting]
        true, members, draws = self._landscape(params, repetitions)
        n = len(true)
        reference = torch.full((n,), 1 / n, dtype=torch.float64)
        base = float(reference @ true)
        coefs = params["kl_coef"] * torch.tensor([2.0**-k for k in HALVINGS], dtype=torch.float64)
        records = []
        for name, method in self.methods.items():
            reward, weight = _scores(method, members, draws, reference)
            course = optimal_course(reward, weight, reference, true, coefs)
            # Eight decimals: the files would be twice as large with all of them.
            kl, value = (x.T.round(decimals=8).tolist() for x in course)
            for i, repetition in enumerate(repetitions):
                records.append(Record(name, setting, *repetition, kl[i], value[i], base, final=HALVINGS.index(0)))
        return records

    def _landscape(self, params: Mapping[str, Any], repetitions: Sequence[Repetition]) -> tuple[Tensor, Tensor, Draws]:
        """True rewards `(n,)`, members' rewards `(R, n, K)`, and what is known of their variance: of all objectives."""
        m = params["objectives"]
        worlds = [self.world.draw(params["world"], params["noise_ratio"], objective) for objective in range(m)]
        drawn = [
            _ensembles(*world, params["members"], params["correlation"], repetitions, objective)
            for objective, world in enumerate(worlds)
        ]
        true = torch.stack([one for one, _ in worlds]).sum(0) / m**0.5
        rewards = torch.stack([one for one, _ in drawn]).sum(0) / m**0.5
        # Errors of separate ensembles are independent: variances add, and nothing is estimated twice.
        variance, exact = (torch.stack([d[i] for _, d in drawn]).sum(0) / m for i in range(2))
        return true, rewards, drawn[0][1]._replace(members=variance, true=exact)


def _generator(seed: int, objective: int) -> np.random.Generator:
    """Random numbers of an objective; the first has those that it would have alone."""
    return np.random.default_rng([seed, objective] if objective else seed)


def _ensembles(
    true: Tensor,
    sigma: Tensor,
    num_members: int,
    correlation: float,
    repetitions: Sequence[Repetition],
    objective: int = 0,
) -> tuple[Tensor, Draws]:
    """Members' rewards `(R, n, K)` and what is known of their variance, each repetition from its own seed."""
    n = len(true)
    common, own, normal, order = [], [], [], []
    for repetition in repetitions:
        rng = _generator(repetition.seed, objective)
        common.append(rng.standard_normal((n, 1)))
        normal.append(rng.standard_normal(n))
        order.append(rng.permutation(n))
        # Last, so that further members leave everything else as it was.
        own.append(rng.standard_normal((num_members, n)).T)
    noise = correlation**0.5 * np.stack(common) + (1 - correlation) ** 0.5 * np.stack(own)
    rewards = true[:, None] + sigma[:, None] * torch.from_numpy(noise)
    variance = rewards.var(-1, correction=1) if num_members > 1 else torch.zeros(len(repetitions), n).double()
    spoiled = torch.from_numpy(np.stack(normal)), torch.from_numpy(np.stack(order))
    return rewards, Draws(variance, sigma.square(), *spoiled)


def _scores(method: Method, members: Tensor, draws: Draws, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The objective's reward and weight of every response, both `(R, n)`."""
    told = (method.told or Honest())(draws)
    rewards, weights = [], []
    for estimate, variance in zip(members, told, strict=True):
        method.objective.prepare(members.shape[-1])
        # The mean over the reference's responses, which training measures by sampling, is known here.
        unit = (reference * variance).sum()
        score = method.objective(RewardEstimate(estimate.mean(-1), variance, estimate, unit))
        rewards.append(score.reward)
        weights.append(score.kl_weight)
    return torch.stack(rewards), torch.stack(weights)
