"""Distances from a reference: against scikit-learn and scipy, by hand, and how often its own responses are outliers."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from sklearn.covariance import LedoitWolf

from lit_vapo.functional import (
    Spread,
    chi_square_quantile,
    fit_spread,
    held_out_distances,
    outlier_bound,
    squared_distance,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def unequal(rows, width, seed=0, tail=None):
    """Features whose variances differ by 400, normal or with the tail of Student's t."""
    x = draw(rows, width, seed=seed) * torch.linspace(0, 3, width, dtype=torch.float64).exp()
    if tail is not None:
        squares = draw(rows, tail, seed=seed + 1000).square().sum(1, keepdim=True)
        x = x * (tail / squares).sqrt()
    return x


def covariance(spread):
    return (
        spread.floor * torch.eye(len(spread.mean)).double() + (spread.directions.T * spread.gains) @ spread.directions
    )


@pytest.mark.parametrize(("rows", "width"), [(60, 8), (12, 40), (200, 200), (30, 1)])
def test_covariance_and_distance_are_those_of_scikit_learn(rows, width):
    x, new = unequal(rows, width), unequal(50, width, seed=1)
    expected = LedoitWolf().fit(x.numpy())
    spread = fit_spread(x)
    np.testing.assert_allclose(covariance(spread).numpy(), expected.covariance_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(squared_distance(new, spread).numpy(), expected.mahalanobis(new.numpy()), rtol=1e-6)


def test_distance_by_hand():
    # Variance 4 along the diagonal (1, 1)/√2 and 1 across: (2, 2) is 2√2 along, 8/4 = 2; (2, -2) is as far across, 8.
    diagonal = torch.tensor([[1.0, 1.0]]) / 2**0.5
    spread = Spread(torch.tensor([1.0, 0.0]), diagonal, torch.tensor([3.0]), torch.tensor(1.0))
    found = squared_distance(torch.tensor([[3.0, 2.0], [3.0, -2.0], [1.0, 0.0]]), spread)
    torch.testing.assert_close(found, torch.tensor([2.0, 8.0, 0.0]))


def test_distance_does_not_depend_on_the_origin_or_the_unit():
    x, new = unequal(60, 8), unequal(20, 8, seed=1)
    expected = squared_distance(new, fit_spread(x))
    torch.testing.assert_close(squared_distance(7 * new + 100, fit_spread(7 * x + 100)), expected)


def test_held_out_distances_are_those_of_a_loop():
    x = unequal(40, 6)
    found = held_out_distances(x)
    for i in range(40):
        others = [j for j in range(40) if j % 16 != i % 16]
        torch.testing.assert_close(found[i], squared_distance(x[i : i + 1], fit_spread(x[others]))[0])
    assert found.mean() > squared_distance(x, fit_spread(x)).mean()


@pytest.mark.parametrize("degrees", [0.3, 1.0, 2.0, 17.5, 4000.0])
@pytest.mark.parametrize("probability", [0.01, 0.5, 0.95, 0.999])
def test_quantiles_are_those_of_scipy(probability, degrees):
    found = chi_square_quantile(probability, torch.tensor(degrees).double())
    assert found.item() == pytest.approx(chi2.ppf(probability, degrees), rel=1e-6)


def test_the_bound_is_that_of_chi_square_where_distances_are_chi_square():
    distances = 3 * torch.from_numpy(chi2.rvs(5, size=200_000, random_state=0))
    assert outlier_bound(distances, 0.05).item() == pytest.approx(3 * chi2.ppf(0.95, 5), rel=0.02)


@pytest.mark.parametrize(
    ("rows", "width", "tail"), [(256, 32, None), (96, 200, None), (256, 64, 5)], ids=["many rows", "few rows", "tails"]
)
def test_the_reference_s_own_responses_are_outliers_as_rarely_as_was_asked(rows, width, tail):
    """The false alarms, on held-out responses of a known distribution, over ten references each."""
    rates = {0.05: [], 0.01: []}
    plain = []
    for seed in range(10):
        x, new = unequal(rows, width, seed, tail), unequal(2000, width, seed + 50, tail)
        own, distances = held_out_distances(x), squared_distance(new, fit_spread(x))
        for level, found in rates.items():
            found.append((distances > outlier_bound(own, level)).double().mean().item())
        plain.append((distances > chi2.ppf(0.99, width)).double().mean().item())
    assert 0.02 < np.mean(rates[0.05]) < 0.07
    assert 0.004 < np.mean(rates[0.01]) < 0.02
    assert max(rates[0.01]) < 0.05
    # χ² with as many degrees of freedom as features is no bound: hardly ever beyond it, or far too often.
    assert not 0.005 < np.mean(plain) < 0.03


def test_a_shift_is_seen():
    # Of every feature by a part of its standard deviation.
    x = unequal(256, 64)
    bound, spread = outlier_bound(held_out_distances(x), 0.01), fit_spread(x)
    shares = []
    for shift in (0.0, 0.25, 0.5, 1.0):
        moved = unequal(500, 64, seed=9) + shift * x.std(0)
        shares.append((squared_distance(moved, spread) > bound).double().mean().item())
    assert shares == sorted(shares)
    assert shares[0] < 0.03
    assert shares[-1] > 0.75


def test_distances_are_not_rounded_by_autocast():
    x, new = unequal(60, 8).float(), unequal(20, 8, seed=1).float()
    spread = Spread(*(part.float() for part in fit_spread(x)))
    expected = squared_distance(new, spread)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(squared_distance(new, spread), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_spread(torch.zeros(1, 3)), r"expected features of shape \(N, H\) with N >= 2, got \(1, 3\)"),
        (lambda: fit_spread(torch.full((2, 3), float("nan"))), "expected finite features, got NaN or infinity"),
        (lambda: fit_spread(torch.ones(5, 3)), "features that differ between responses, got 5 equal rows"),
        (lambda: squared_distance(torch.ones(5, 3), fit_spread(draw(9, 4))), r"of shape \(B, 4\), got \(5, 3\)"),
        (lambda: held_out_distances(draw(3, 4)), "expected at least 4 rows to hold some out, got 3"),
        (lambda: outlier_bound(draw(9).abs(), 0.0), "expected a level between 0 and 1, got 0.0"),
        (lambda: outlier_bound(torch.ones(9), 0.1), "expected distances that vary, got equal ones"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
