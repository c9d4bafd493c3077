"""The theory for one prompt with n responses, exact: objective, divergence, optimum, risk of ending worse.

Source: Banerjee, Saha, Gopalan, "Towards Reliable, Uncertainty-Aware Alignment", arXiv 2507.15906.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lit_vapo.functional.masked import check_same_shape

# Newton's steps to an optimum; a dozen are usual.
MAX_STEPS = 200


def _check_finite(name: str, x: Tensor) -> None:
    """Raise ValueError unless all entries of `x` are finite."""
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"expected {name} with finite entries, got {x.tolist()}")


def _check_vector(name: str, x: Tensor) -> None:
    """Raise ValueError unless `x` is a vector with at least one entry, all of them finite."""
    if x.ndim != 1 or x.shape[0] == 0:
        raise ValueError(f"expected {name} of shape (n,) with n >= 1, got {tuple(x.shape)}")
    _check_finite(name, x)


def bregman_kl(policy: Tensor, ref_probs: Tensor, weight: Tensor | None = None) -> Tensor:
    """The weighted divergence of a policy from its reference.

        D_w(π || π0) = Σ_y w(y) * ( π(y) log(π(y)/π0(y)) - π(y) + π0(y) )

    A Bregman divergence: never negative, and zero only at π = π0 (where w > 0). The naive Σ w π log(π/π0) is
    neither.

    Args:
        policy: `(…, n)`, π, differentiable where positive.
        ref_probs: `(…, n)`, π0.
        weight: `(…, n)`, w >= 0; None for 1, which gives the KL divergence.

    Returns:
        `(…)`, in nats times the unit of w; infinite where π > 0 = π0.

    Raises:
        ValueError: if the shapes differ.

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> bregman_kl(p, q)  # 0.5 log 2 + 0.5 log(2/3)
        tensor(0.1438)
    """
    check_same_shape(policy=policy, ref_probs=ref_probs)
    terms = torch.xlogy(policy, policy) - torch.xlogy(policy, ref_probs) - policy + ref_probs
    if weight is None:
        return terms.sum(-1)
    check_same_shape(policy=policy, weight=weight)
    return (weight * terms).sum(-1)


def objective(
    policy: Tensor, reward: Tensor, ref_probs: Tensor, kl_coef: float, weight: Tensor | None = None
) -> Tensor:
    """The objective J(π) = E_π[R] - β * D_w(π || π0).

    Args:
        policy: `(…, n)`, π.
        reward: `(…, n)`, R, in units of reward.
        ref_probs: `(…, n)`, π0.
        kl_coef: β, in units of reward per nat.
        weight: `(…, n)`, w >= 0; None for 1, which is standard RLHF.

    Returns:
        `(…)`, in units of reward.

    Raises:
        ValueError: if the shapes differ.
    """
    check_same_shape(policy=policy, reward=reward)
    return (policy * reward).sum(-1) - kl_coef * bregman_kl(policy, ref_probs, weight)


def optimal_policy(reward: Tensor, ref_probs: Tensor, kl_coef: float | Tensor, weight: Tensor | None = None) -> Tensor:
    """The policy that maximises `objective`, for one prompt or for many at once.

        π*(y) = π0(y) * exp( (R(y) - c) / (β * w(y)) ),    c such that it sums to 1

    log Σ_y π0 exp((R - c) / (β * w)) is convex in c and falls, so Newton's steps from its left climb to the zero
    without passing it. They start at c = E_π0[R/w] / E_π0[1/w], where by Jensen's inequality it is not negative; for
    a constant weight the first step is exact. w = 1 gives the Gibbs policy; β to infinity gives π0.

    Args:
        reward: `(…, n)`, R, in units of reward.
        ref_probs: `(…, n)`, π0 >= 0, summing to 1.
        kl_coef: β > 0, in units of reward per nat; a number, or a tensor that broadcasts to `(…)`.
        weight: `(…, n)`, w > 0; None for 1.

    Returns:
        `(…, n)` float64; zero where π0 is.

    Raises:
        ValueError: if shapes differ, an entry is not finite, π0 is no distribution, or β or a weight is not
            positive.

    Examples:
        >>> pi = optimal_policy(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]), kl_coef=1.0)
        >>> [round(p, 4) for p in pi.tolist()]  # sigmoid(1) = 0.7311
        [0.7311, 0.2689]
    """
    for name, x in (("reward", reward), ("ref_probs", ref_probs), ("weight", weight)):
        if x is None:
            continue
        if x.ndim == 0 or x.shape[-1] == 0:
            raise ValueError(f"expected {name} of shape (…, n) with n >= 1, got {tuple(x.shape)}")
        _check_finite(name, x)
        check_same_shape(**{"reward": reward, name: x})
    r, p0 = reward.double(), ref_probs.double()
    if bool((p0 < 0).any()) or bool(((p0.sum(-1) - 1.0).abs() > 1e-4).any()):
        raise ValueError(f"expected ref_probs >= 0 that sum to 1, got {ref_probs.tolist()}")
    w = torch.ones_like(r) if weight is None else weight.double()
    price = torch.as_tensor(kl_coef, dtype=r.dtype)[..., None] * w
    if not bool(((price > 0) & price.isfinite()).all()):
        raise ValueError(f"expected finite kl_coef > 0 and every weight > 0, got {kl_coef} and {w.tolist()}")
    log_p0, slope = (p0 / p0.sum(-1, keepdim=True)).log(), 1 / price
    # Distances below the best reward in reach, so that c stands near 0 and keeps its relative precision.
    best = r.masked_fill(p0 <= 0, -torch.inf).amax(-1, keepdim=True)
    below = torch.where(p0 > 0, r - best, 0.0)
    c = (p0 * slope * below).sum(-1, keepdim=True) / (p0 * slope).sum(-1, keepdim=True)
    for _ in range(MAX_STEPS):
        logits = log_p0 + (below - c) * slope
        excess = logits.logsumexp(-1, keepdim=True)
        if bool((excess.abs() <= 1e-12).all()):
            break
        c = c + excess / (logits.softmax(-1) * slope).sum(-1, keepdim=True)
    return torch.softmax(log_p0 + (below - c) * slope, dim=-1)


def match_kl(
    optimum: Callable[[Tensor], Tensor],
    ref_probs: Tensor,
    nats: float,
    bracket: tuple[float, float] = (1e-4, 1e4),
    iterations: int = 40,
) -> Tensor:
    """The optima of an objective at the β that takes each policy a given KL away from its reference.

    Objectives price their moves differently, so at equal β they travel different distances; they are compared where
    they have gone equally far.

    Args:
        optimum: the optimal policies `(…, n)` at coefficients β `(…)`; their KL is taken to fall as β grows.
        ref_probs: `(…, n)`, π0.
        nats: KL(π‖π0) to reach, > 0.
        bracket: least and greatest β.
        iterations: halvings of the bracket, in log β.

    Returns:
        `(…, n)`; NaN where the KL was not met within a hundredth: no β of the bracket goes so far.
    """
    low, high = (torch.full(ref_probs.shape[:-1], math.log(x), dtype=torch.float64) for x in bracket)
    for _ in range(iterations):
        middle = 0.5 * (low + high)
        too_far = bregman_kl(optimum(middle.exp()), ref_probs) > nats
        low, high = torch.where(too_far, middle, low), torch.where(too_far, high, middle)
    policy = optimum((0.5 * (low + high)).exp())
    missed = (bregman_kl(policy, ref_probs) - nats).abs() > 0.01 * nats
    return policy.masked_fill(missed[..., None], torch.nan)


def _check_risk(true_reward: Tensor, sigma_diag: Tensor) -> tuple[Tensor, Tensor]:
    """Validate the arguments of the two risks and return them in float64."""
    _check_vector("true_reward", true_reward)
    _check_vector("sigma_diag", sigma_diag)
    check_same_shape(true_reward=true_reward, sigma_diag=sigma_diag)
    reward, variance = true_reward.double(), sigma_diag.double()
    if not bool((variance > 0).all()):
        raise ValueError(f"expected positive variances in sigma_diag, got {sigma_diag.tolist()}")
    if bool((reward == reward[0]).all()):
        raise ValueError(f"expected a true_reward that varies, got {true_reward.tolist()}")
    return reward, variance


def risk_vanilla(true_reward: Tensor, sigma_diag: Tensor) -> Tensor:
    """Probability that a small step of plain RLHF ends worse than the reference.

    With R ~ N(R*, Σ) the estimated reward and P = I - 11'/n, the step is along P R, and

        risk = Φ( -R*'P R* / sqrt(R*'P Σ P R*) )

    The steps are those of a reference that is uniform over the responses.

    Args:
        true_reward: `(n,)`, R*, in units of reward.
        sigma_diag: `(n,)`, the diagonal of Σ: the variance of the estimate of each reward, > 0.

    Returns:
        `()` float64, in [0, 1/2].

    Raises:
        ValueError: if shapes differ, a variance is not positive, or the true reward is the same everywhere.
    """
    reward, variance = _check_risk(true_reward, sigma_diag)
    centred = reward - reward.mean()
    gain = centred.square().sum()
    return torch.special.ndtr(-gain / (variance * centred.square()).sum().sqrt())


def risk_variance_aware(true_reward: Tensor, sigma_diag: Tensor) -> Tensor:
    """Probability that a small step of variance-aware RLHF ends worse than the reference.

    With M = Σ⁻¹ - Σ⁻¹11'Σ⁻¹ / (1'Σ⁻¹1), the step is along M R, and

        risk = Φ( -sqrt(R*'M R*) )

    which by Cauchy and Schwarz is at most that of `risk_vanilla`. The steps are those of a uniform reference.

    Args:
        true_reward: `(n,)`, R*, in units of reward.
        sigma_diag: `(n,)`, the diagonal of Σ: the variance of the estimate of each reward, > 0.

    Returns:
        `()` float64, in [0, 1/2].

    Raises:
        ValueError: if shapes differ, a variance is not positive, or the true reward is the same everywhere.
    """
    reward, variance = _check_risk(true_reward, sigma_diag)
    precision = 1.0 / variance
    # R*'M R* is the precision-weighted sum of squares about the precision-weighted mean; in this form it
    # cannot be negative.
    centred = reward - (precision * reward).sum() / precision.sum()
    return torch.special.ndtr(-(precision * centred.square()).sum().sqrt())
