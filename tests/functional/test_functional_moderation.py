"""Variances shrunk to the typical one: hand-worked values, scipy, planted priors, limits."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import digamma, polygamma

from lit_vapo.functional import (
    VariancePrior,
    fit_variance_prior,
    inverse_trigamma,
    moderated_variance,
    shrinkage,
)


def drawn(typical, prior_degrees, degrees, count=40_000, seed=0):
    """Variances σ² from a prior, and estimates of them."""
    rng = np.random.default_rng(seed)
    true = prior_degrees * typical / rng.chisquare(prior_degrees, count)
    return torch.from_numpy(true), torch.from_numpy(true * rng.chisquare(degrees, count) / degrees)


def test_two_variances_by_hand():
    # d = 2: ψ(1) = −γ, ψ'(1) = π²/6, log(d/2) = 0, so e = log s² + γ. With log s² = ±π/√6 the variance of e is
    # 2·π²/6, the excess π²/6 = ψ'(1): d0 = 2. And log s0² = mean e + ψ(1) − log 1 = γ − γ = 0.
    variance = torch.tensor([1.0, -1.0], dtype=torch.float64).mul(math.pi / 6**0.5).exp()
    prior = fit_variance_prior(variance, degrees=2)
    assert prior.typical.item() == pytest.approx(1.0, rel=1e-8)
    assert prior.degrees.item() == pytest.approx(2.0, rel=1e-8)
    assert shrinkage(2, prior).item() == pytest.approx(0.5, rel=1e-8)
    # Half of the typical one and half of its own: (1 + e^(π/√6)) / 2 = (1 + 3.6054)/2.
    moderated = moderated_variance(variance, prior.typical, shrinkage(2, prior))
    assert moderated[0].item() == pytest.approx((1 + math.exp(math.pi / 6**0.5)) / 2, rel=1e-8)


def test_moments_are_those_of_scipy():
    _, variance = drawn(0.7, 8, 9, count=500)
    e = np.log(variance.numpy()) - digamma(4.5) + np.log(4.5)
    half = brentq(lambda y: polygamma(1, y) - (e.var(ddof=1) - polygamma(1, 4.5)), 1e-3, 1e5)
    prior = fit_variance_prior(variance, 9)
    assert prior.degrees.item() == pytest.approx(2 * half, rel=1e-6)
    assert prior.typical.item() == pytest.approx(np.exp(e.mean() + digamma(half) - np.log(half)), rel=1e-6)


@pytest.mark.parametrize(("prior_degrees", "degrees"), [(4, 3), (10, 9), (45, 9)])
def test_a_planted_prior_is_found_and_moderated_variances_are_nearer_the_truth(prior_degrees, degrees):
    true, variance = drawn(1.7, prior_degrees, degrees)
    prior = fit_variance_prior(variance, degrees)
    assert prior.typical.item() == pytest.approx(1.7, rel=0.02)
    assert prior.degrees.item() == pytest.approx(prior_degrees, rel=0.1)
    moderated = moderated_variance(variance, prior.typical, shrinkage(degrees, prior))
    error, before = ((x.log() - true.log()).square().mean() for x in (moderated, variance))
    assert error < 0.6 * before


def test_variances_that_differ_by_noise_alone_become_one():
    rng = np.random.default_rng(3)
    # A mean that is seen 200 times: these happen to differ by a little less than their noise.
    variance = torch.from_numpy(rng.chisquare(9, 200) / 9)
    variance = variance.log().mul(0.9).exp()
    prior = fit_variance_prior(variance, 9)
    assert math.isinf(prior.degrees.item())
    moderated = moderated_variance(variance, prior.typical, shrinkage(9, prior))
    torch.testing.assert_close(moderated, variance.mean().expand(200), rtol=1e-12, atol=0)


def test_many_members_leave_variances_alone():
    prior = VariancePrior(torch.tensor(2.0), torch.tensor(10.0))
    assert shrinkage(10**7, prior).item() < 2e-6
    assert torch.equal(
        moderated_variance(torch.tensor([1.0, 3.0]), torch.tensor(2.0), torch.tensor(0.0)), torch.tensor([1.0, 3.0])
    )


def test_a_unit_of_reward_does_not_matter():
    _, variance = drawn(1.0, 6, 4, count=300)
    one, other = fit_variance_prior(variance, 4), fit_variance_prior(variance * 49, 4)
    torch.testing.assert_close(other.degrees, one.degrees)
    torch.testing.assert_close(other.typical, one.typical * 49)


def test_a_variance_of_zero_is_no_infinite_logarithm():
    _, variance = drawn(1.0, 6, 4, count=300)
    with_zero = fit_variance_prior(torch.cat([variance, torch.zeros(1).double()]), 4)
    assert with_zero.typical.item() == pytest.approx(1.0, rel=0.2)
    assert 1 < with_zero.degrees.item() < 8
    nothing = fit_variance_prior(torch.zeros(5), 4)
    assert shrinkage(4, nothing).item() == 0


@pytest.mark.parametrize("x", [1e-8, 1e-3, 0.25, 1.0, 30.0, 1e7])
def test_inverse_trigamma_is_the_inverse(x):
    y = inverse_trigamma(torch.tensor(x, dtype=torch.float64))
    assert float(polygamma(1, y.item())) == pytest.approx(x, rel=1e-9)


def test_inverse_trigamma_of_known_values():
    # ψ'(1) = π²/6, ψ'(½) = π²/2.
    found = inverse_trigamma(torch.tensor([math.pi**2 / 6, math.pi**2 / 2], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5], dtype=torch.float64))


@pytest.mark.parametrize(
    "variance", [torch.ones(1), torch.ones(2, 2), torch.tensor([1.0, -1.0]), torch.tensor([1.0, math.nan])]
)
def test_what_are_no_variances_is_refused(variance):
    with pytest.raises(ValueError, match=r"expected finite variances \(N,\) >= 0 with N >= 2, got"):
        fit_variance_prior(variance, 3)


def test_no_degrees_of_freedom_are_refused():
    with pytest.raises(ValueError, match="expected degrees >= 1, got 0"):
        fit_variance_prior(torch.ones(3), 0)
