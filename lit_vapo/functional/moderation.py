"""Variances of few members, shrunk to the typical one: empirical Bayes.

The variance s² of K members is an estimate with d = K − 1 degrees of freedom, s² ~ σ²·χ²_d/d, and known to ±√(2/d)
only. Many responses tell how variances are distributed, and so how much of their differences is noise.

Source: Smyth, "Linear models and empirical Bayes methods for assessing differential expression in microarray
experiments", Statistical Applications in Genetics and Molecular Biology 3(1), 2004, article 3, sections 4 and 6.2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# A variance that rounding or chance made zero has no logarithm: none counts as less than this share of the median.
LEAST_SHARE = 1e-5


class VariancePrior(NamedTuple):
    """What variances of responses are like: 1/σ² ~ χ²_d0 / (d0·s0²).

    Attributes:
        typical: `()`, s0², in units of reward squared.
        degrees: `()`, d0 >= 0: how many degrees of freedom it is worth that responses are alike. Infinite where the
            variances differ by no more than their own noise.
    """

    typical: Tensor
    degrees: Tensor


def fit_variance_prior(variance: Tensor, degrees: int) -> VariancePrior:
    """Fit the distribution of variances to their sample estimates, by the first two moments of the logarithm.

        e = log s² − ψ(d/2) + log(d/2),    Var(e) = ψ'(d/2) + ψ'(d0/2),    E(e) = log s0² − ψ(d0/2) + log(d0/2)

    Where the variance of e is no larger than ψ'(d/2), the noise of the estimates, d0 is infinite, and s0² the mean of
    s², its best estimate then. Responses count as independent. Their variances come from the same members and are not
    quite: the noise that they share does not show as differences, and d0 comes out larger than it is.

    Args:
        variance: `(N,)`, s² of N >= 2 responses, in units of reward squared.
        degrees: d >= 1, the degrees of freedom of each.

    Returns:
        The prior. Where half of the variances or more are zero, nothing is known: d0 = 0 leaves variances alone.

    Raises:
        ValueError: if there are fewer than two variances, one is negative or not finite, or d < 1.

    Examples:
        >>> fit_variance_prior(torch.tensor([1.0, 2.0, 3.0]), degrees=4)  # they differ by less than their noise
        VariancePrior(typical=tensor(2.), degrees=tensor(inf))
    """
    if variance.ndim != 1 or len(variance) < 2 or not bool((variance.isfinite() & (variance >= 0)).all()):
        raise ValueError(f"expected finite variances (N,) >= 0 with N >= 2, got {tuple(variance.shape)}: {variance}")
    if degrees < 1:
        raise ValueError(f"expected degrees >= 1, got {degrees}")
    x = variance.double()
    median = x.median()
    if median == 0:
        return VariancePrior(torch.zeros_like(variance[0]), torch.zeros_like(variance[0]))
    half = x.new_tensor(degrees / 2)
    e = x.clamp_min(LEAST_SHARE * median).log() - torch.digamma(half) + half.log()
    excess = e.var(correction=1) - torch.polygamma(1, half)
    if excess <= 0:
        return VariancePrior(x.mean().to(variance), torch.full_like(variance[0], math.inf))
    prior = inverse_trigamma(excess)
    typical = (e.mean() + torch.digamma(prior) - prior.log()).exp()
    return VariancePrior(typical.to(variance), (2 * prior).to(variance))


def shrinkage(degrees: int, prior: VariancePrior) -> Tensor:
    """Share () of the typical variance in a moderated one, d0/(d0 + d), in [0, 1].

    Args:
        degrees: d, the degrees of freedom of a variance.
        prior: What variances are like.

    Examples:
        >>> shrinkage(9, VariancePrior(torch.tensor(1.0), torch.tensor(3.0)))
        tensor(0.2500)
    """
    return torch.where(prior.degrees.isinf(), 1.0, prior.degrees / (prior.degrees + degrees))


def moderated_variance(variance: Tensor, typical: Tensor, share: Tensor) -> Tensor:
    """The variance that members and prior say together: the mean of 1/σ² given s², inverted.

        σ̃² = (d0·s0² + d·s²) / (d0 + d) = share·s0² + (1 − share)·s²

    Their order stays as it is.

    Args:
        variance: `(…)`, s².
        typical: `()`, s0².
        share: `()`, as `shrinkage` gives it: 0 leaves variances alone, 1 makes all of them s0².

    Examples:
        >>> moderated_variance(torch.tensor([0.0, 4.0]), torch.tensor(1.0), torch.tensor(0.25))
        tensor([0.2500, 3.2500])
    """
    return variance + share * (typical - variance)


def inverse_trigamma(x: Tensor) -> Tensor:
    """The y > 0 with ψ'(y) = x, by Newton's method for 1/ψ', which is convex and nearly straight.

    Source: Smyth (2004), appendix.

    Args:
        x: `(…)` float64 > 0.

    Returns:
        `(…)`.

    Examples:
        >>> inverse_trigamma(torch.tensor(torch.pi**2 / 6, dtype=torch.float64))  # ψ'(1) = π²/6
        tensor(1.0000, dtype=torch.float64)
    """
    # The start is too small, 1/ψ' rises, and its tangents lie below it: steps go up and never too far.
    y = 0.5 + 1 / x
    for _ in range(50):
        slope = torch.polygamma(1, y)
        step = slope * (1 - slope / x) / torch.polygamma(2, y)
        y = y + step
        if bool((step.abs() <= 1e-10 * y).all()):
            break
    return y
