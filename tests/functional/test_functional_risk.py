"""Means between the mean and the least: by hand, against scipy and a linear programme, and in their limits."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.special import logsumexp

from lit_vapo.functional import lower_tail_mean, soft_minimum


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_soft_minimum_by_hand():
    # Members 0, log 2, log 4 at c = 1: exp(-r) = 1, 1/2, 1/4, their mean 7/12. At c = 2: 1, 1/√2, 1/2.
    x = torch.tensor([0.0, math.log(2), math.log(4)])
    assert soft_minimum(x, 1.0).item() == pytest.approx(-math.log(7 / 12), rel=1e-6)
    assert soft_minimum(x, 2.0).item() == pytest.approx(-2 * math.log((1.5 + 0.5**0.5) / 3), rel=1e-6)
    # Weights 1/2, 1/4, 1/4: 1/2 + 1/8 + 1/16 = 11/16.
    weights = torch.tensor([0.5, 0.25, 0.25])
    assert soft_minimum(x, 1.0, weights).item() == pytest.approx(-math.log(11 / 16), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 30.0])
def test_a_soft_minimum_is_scipy_s(temperature):
    x = draw(50, 7).double()
    expected = -temperature * (logsumexp(-x.numpy() / temperature, axis=1) - math.log(7))
    torch.testing.assert_close(soft_minimum(x, temperature), torch.from_numpy(expected), rtol=1e-9, atol=1e-12)


def test_a_soft_minimum_is_the_worst_that_an_adversary_can_do_who_pays_for_each_nat():
    # The least of E_q[x] + c·KL(q‖uniform) is at q ∝ exp(-x/c); no other q does better.
    x, c = draw(6).double(), 0.7
    q = (-x / c).softmax(0)

    def price(q):
        return (q * x).sum() + c * (q * (6 * q).log()).sum()

    assert soft_minimum(x, c).item() == pytest.approx(price(q).item(), rel=1e-9)
    others = draw(200, 6, seed=1).double().softmax(1)
    assert min(price(other).item() for other in others) > soft_minimum(x, c).item()


def test_limits_of_a_soft_minimum():
    x = 3 * draw(40, 5)
    torch.testing.assert_close(soft_minimum(x, 0.0), x.amin(1))
    torch.testing.assert_close(soft_minimum(x, 1e-4), x.amin(1), rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(soft_minimum(x, 1e12), x.mean(1))
    torch.testing.assert_close(soft_minimum(x, math.inf), x.mean(1))
    # Where x hardly varies: mean - variance/(2c), up to the third cumulant over 6c².
    near = 5.0 + 1e-2 * x.double()
    expected = near.mean(1) - near.var(1, correction=0) / (2 * 0.4)
    torch.testing.assert_close(soft_minimum(near, 0.4), expected, rtol=0, atol=2e-4)
    gap = (near.mean(1) - soft_minimum(near, 0.4)) / (near.mean(1) - expected)
    torch.testing.assert_close(gap, torch.ones_like(gap), rtol=0.1, atol=0.0)


def test_a_soft_minimum_lies_between_the_least_and_its_bound():
    x = 3 * draw(40, 5)
    for c in (0.1, 1.0, 10.0):
        found = soft_minimum(x, c)
        assert (found >= x.amin(1)).all()
        assert (found <= torch.minimum(x.mean(1), x.amin(1) + c * math.log(5)) + 1e-6).all()


def test_a_weight_of_zero_is_not_seen():
    x = torch.tensor([1.0, -math.inf, 2.0])
    weights = torch.tensor([0.5, 0.0, 0.5])
    torch.testing.assert_close(soft_minimum(x, 0.5, weights), soft_minimum(x[[0, 2]], 0.5))


def test_a_lower_tail_by_hand():
    # The worst 3/4 of four numbers are three: (0 + 1 + 4)/3. The worst 5/8 are two and a half: (0 + 1 + 2)/2.5.
    x = torch.tensor([4.0, 0.0, 9.0, 1.0])
    assert lower_tail_mean(x, 0.75).item() == pytest.approx(5 / 3)
    assert lower_tail_mean(x, 0.625).item() == pytest.approx(3 / 2.5)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.37, 0.5, 0.93, 1.0])
def test_a_lower_tail_is_the_optimum_of_its_linear_programme(share):
    # Rockafellar & Uryasev: the least of q·x over q >= 0 with Σq = 1 and q_k <= 1/(αK).
    x = draw(7, seed=3).double()
    bounds = [(0, 1 / (share * 7))] * 7
    found = linprog(x.numpy(), A_eq=np.ones((1, 7)), b_eq=[1.0], bounds=bounds) if share * 7 >= 1 else None
    expected = found.fun if found is not None else x.min().item()
    assert lower_tail_mean(x, share).item() == pytest.approx(expected, rel=1e-7)


def test_limits_of_a_lower_tail_and_it_is_continuous():
    x = draw(30, 5)
    torch.testing.assert_close(lower_tail_mean(x, 1.0), x.mean(1))
    torch.testing.assert_close(lower_tail_mean(x, 0.2), x.amin(1))
    torch.testing.assert_close(lower_tail_mean(x, 0.01), x.amin(1))
    shares = torch.linspace(0.15, 1, 400).tolist()
    values = torch.stack([lower_tail_mean(x.double(), share) for share in shares])
    steps = values.diff(dim=0)
    assert (steps >= -1e-12).all()
    # Its slope is at most (x_(K-1) - x_(0))·K for shares above 1/K.
    assert (steps <= (x.amax(1) - x.amin(1)) * 5 * (shares[1] - shares[0])).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soft_minimum(torch.zeros(2, 0), 1.0), r"expected x of shape \(…, K\) with K >= 1, got \(2, 0\)"),
        (lambda: soft_minimum(torch.zeros(2), -1.0), "expected temperature >= 0, got -1.0"),
        (lambda: soft_minimum(torch.zeros(2), math.nan), "expected temperature >= 0, got nan"),
        (lambda: lower_tail_mean(torch.zeros(2, 0), 1.0), r"expected x of shape \(…, K\) with K >= 1, got \(2, 0\)"),
        (lambda: lower_tail_mean(torch.zeros(2), 0.0), "expected a share above 0 and at most 1, got 0.0"),
        (lambda: lower_tail_mean(torch.zeros(2), 1.1), "expected a share above 0 and at most 1, got 1.1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
