"""Which objective and which settings? Exact optima on tables of rewards, all at the same KL, without a language model.

    python benchmarks/objectives_tabular.py

Each repetition is one prompt with 128 responses: a reference policy, true rewards of unit spread, and K members that
see them with errors. Every objective's own class makes reward and weight from the members, its exact optimum is found,
and β is chosen so that the policy ends a given KL away from its reference. Printed is the true return gained over the
reference, in standard deviations of the true reward: mean ± spread over repetitions, and the risk, which is the share
of repetitions that end worse than the reference. A minute and a half on one core.

Landscapes: an error's standard deviation varies tenfold between responses (log-uniform); or is the same for all; or
varies tenfold, and half of the error's variance is shared by all members, so that they cannot disagree about it; or
members err about a few properties of the responses, each in its own way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lit_vapo.functional import (
    covariance_optimal_policy,
    ensemble_estimate,
    match_kl,
    optimal_policy,
)
from lit_vapo.objectives.base import Objective
from lit_vapo.objectives.conditional_value_at_risk import ConditionalValueAtRisk
from lit_vapo.objectives.entropic import Entropic
from lit_vapo.objectives.lower_confidence import LowerConfidence
from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.objectives.single_reward import SingleReward
from lit_vapo.objectives.uncertainty_weighted import UncertaintyWeighted
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.objectives.worst_case import WorstCase

REPETITIONS = 200
RESPONSES = 128
LEVELS = (1.0, 2.0, 3.0)
Solver = Callable[[Tensor], Tensor]


class Landscape(NamedTuple):
    """Prompts by the hundred: R repetitions, n responses, K members."""

    ref_probs: Tensor  # (R, n)
    true_reward: Tensor  # (R, n)
    members: Tensor  # (R, n, K), normalised on the reference
    true_variance: Tensor  # (R, n), of the members' errors, in the unit of the members


def landscape(
    count: int = 5, noise: float = 2.0, tenfold: bool = True, shared: float = 0.0, tastes: int = 0
) -> Landscape:
    """Draw one.

    Args:
        count: Members K.
        noise: Root mean square of their errors.
        tenfold: Whether the errors' standard deviation varies tenfold between responses.
        shared: Part of the errors' variance that all members share.
        tastes: So many properties of responses are all that members err about, each in its own way; 0 for errors that
            are independent between responses.
    """
    draw = torch.Generator().manual_seed(0)
    shape = (REPETITIONS, RESPONSES)
    ref = torch.randn(shape, generator=draw, dtype=torch.float64).mul(0.5).softmax(1)
    truth = torch.randn(shape, generator=draw, dtype=torch.float64)
    truth = truth - (ref * truth).sum(1, keepdim=True)
    truth = truth / (ref * truth.square()).sum(1, keepdim=True).sqrt()
    sigma = 10 ** -torch.rand(shape, generator=draw, dtype=torch.float64) if tenfold else torch.ones(shape).double()
    sigma = noise * sigma / sigma.square().mean().sqrt()
    common = torch.randn((*shape, 1), generator=draw, dtype=torch.float64)
    own = torch.randn((*shape, tastes or count), generator=draw, dtype=torch.float64)
    if tastes:
        own = own @ torch.randn((REPETITIONS, tastes, count), generator=draw, dtype=torch.float64) / math.sqrt(tastes)
    members = truth[..., None] + sigma[..., None] * (math.sqrt(shared) * common + math.sqrt(1 - shared) * own)
    loc = (ref[..., None] * members).sum(1, keepdim=True)
    scale = (ref[..., None] * (members - loc).square()).sum(1, keepdim=True).sqrt()
    unit = scale.mean(2)
    return Landscape(ref, truth, (members - loc) / scale, sigma.square() / unit.square())


def by_class(make: Callable[[], Objective], at: Landscape, true_variance: bool = False) -> Solver:
    """The optima of an objective as PPO would see it, each repetition scored by itself."""
    rewards, weights = [], []
    for ref, members, variance in zip(at.ref_probs, at.members, at.true_variance, strict=True):
        estimate = ensemble_estimate(members)
        if true_variance:
            estimate = estimate._replace(variance=variance)
        objective = make().double()
        objective.prepare(members.shape[1])
        # Of the reference, which training measures by sampling; here it is known.
        score = objective(estimate._replace(reference_variance=(ref * estimate.variance).sum()))
        rewards.append(score.reward)
        weights.append(score.kl_weight)
    reward, weight = torch.stack(rewards), torch.stack(weights)
    return lambda kl_coef: optimal_policy(reward, at.ref_probs, kl_coef, weight)


def by_covariance(penalty: float, form: str, at: Landscape) -> Solver:
    """The optima of CovarianceAware, each found from the one at the β before."""
    last = at.ref_probs

    def solve(kl_coef: Tensor) -> Tensor:
        nonlocal last
        last = covariance_optimal_policy(at.members, at.ref_probs, kl_coef, penalty, form == "bound", last)
        return last

    return solve


def solvers(at: Landscape) -> Iterator[tuple[str, Solver]]:
    """What is compared, by name."""
    yield "`SingleReward`", by_class(SingleReward, at)
    yield "`MeanReward`", by_class(MeanReward, at)
    for low, high in ((0.0, math.inf), (0.1, math.inf), (0.1, 10.0), (0.1, 3.0), (0.3, math.inf), (1.0, math.inf)):
        # Bisection wants a weight above zero.
        make = partial(VarianceAware, min_weight=max(low, 1e-6), max_weight=high)
        yield f"`VarianceAware` {low:g} ≤ w ≤ {high:g}".replace("inf", "∞"), by_class(make, at)
    for low in (0.0, 0.1, 0.3):
        make = partial(VarianceAware, min_weight=max(low, 1e-6), max_weight=math.inf)
        yield f"– {low:g} ≤ w, true σ²", by_class(make, at, true_variance=True)
        yield f"– {low:g} ≤ w, reward of one member", by_class(partial(make, member=0), at)
    yield "`WorstCase`", by_class(WorstCase, at)
    for penalty in (0.1, 0.5, 1.0, 2.0):
        yield f"`UncertaintyWeighted` λ = {penalty:g}", by_class(partial(UncertaintyWeighted, penalty), at)
    for penalty in (0.5, 1.0, 2.0):
        yield f"`LowerConfidence` λ = {penalty:g}", by_class(partial(LowerConfidence, penalty), at)
    yield "– λ = 1, true σ", by_class(LowerConfidence, at, true_variance=True)
    for temperature in (0.3, 1.0, 3.0):
        yield f"`Entropic` c = {temperature:g}", by_class(partial(Entropic, temperature), at)
    for share in (0.3, 0.5, 0.7):
        yield f"`ConditionalValueAtRisk` α = {share:g}", by_class(partial(ConditionalValueAtRisk, share), at)
    for form, penalty in (("bound", 0.3), ("bound", 1.0), ("bound", 3.0), ("variance", 1.0), ("variance", 10.0)):
        yield f"`CovarianceAware` {form}, λ = {penalty:g}", by_covariance(penalty, form, at)


def table(at: Landscape) -> Iterator[str]:
    """Gain and risk of every objective at every level, as lines of markdown."""
    head = ["objective", *(f"KL {level:g}" for level in LEVELS)]
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for name, solve in solvers(at):
        cells = [name]
        for level in LEVELS:
            policy = match_kl(solve, at.ref_probs, level, bracket=(0.02, 20.0), iterations=14)
            gain = (policy * at.true_reward).sum(1)
            missed = float(gain.isnan().float().mean())
            gain = gain[~gain.isnan()]
            text = f"{gain.mean():.2f} ± {gain.std():.2f}, {(gain < 0).float().mean():.3f}"
            # Some penalties keep the policy near its reference however small β is.
            unreached = f"{missed:.0%} stay nearer" if missed > 0.1 else f"{text} ({missed:.1%} stay nearer)"
            cells.append(unreached if missed else text)
        yield "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    for title, options in {
        "σ varies tenfold, K = 5": {},
        "σ varies tenfold, K = 10": {"count": 10},
        "σ varies tenfold, half the noise, K = 5": {"noise": 1.0},
        "σ is the same everywhere, K = 5": {"tenfold": False},
        "σ varies tenfold, half of σ² shared by all members, K = 5": {"shared": 0.5},
        "members differ in 8 tastes, σ is nearly the same everywhere, K = 5": {"tenfold": False, "tastes": 8},
    }.items():
        print(f"\n**{title}**\n")
        for line in table(landscape(**options)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
