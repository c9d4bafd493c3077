"""Preferences with noise of labels: by hand, by simulation, and what they leave open."""

import math

import pytest
import torch
from scipy.stats import norm

from lit_vapo.functional import bradley_terry_loss, noise_variance, noisy_log_odds

ZERO = torch.zeros(1, dtype=torch.float64)


def test_log_odds_by_hand():
    # τ² = 4/π · e^log(π/2) = 2 each, so z = 2/√4 = 1; Φ(1) = 0.841345, its log-odds log(0.841345/0.158655) = 1.668268.
    noise = ZERO + math.log(math.pi / 2)
    assert noise_variance(noise).item() == pytest.approx(2.0)
    assert noisy_log_odds(ZERO + 2, ZERO, noise, noise).item() == pytest.approx(1.668268, rel=1e-5)


def test_probability_is_that_of_two_judgements():
    # Whoever compares draws a value of each: scipy's law of their difference, and a simulation.
    chosen, rejected, noises = ZERO + 0.7, ZERO - 0.2, (ZERO + 1.0, ZERO - 0.5)
    found = noisy_log_odds(chosen, rejected, *noises).sigmoid().item()
    spreads = [float(noise_variance(s)) ** 0.5 for s in noises]
    assert found == pytest.approx(norm.sf(0, 0.9, math.hypot(*spreads)), rel=1e-10)
    draws = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = (0.7 + spreads[0] * draws[0] > -0.2 + spreads[1] * draws[1]).double().mean().item()
    assert found == pytest.approx(seen, abs=0.003)


def test_small_differences_without_further_noise_are_those_of_bradley_terry():
    margin = torch.tensor([0.01, -0.02], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(noisy_log_odds(margin, zero, zero, zero), margin, rtol=1e-4, atol=0)
    loss = bradley_terry_loss(margin[:, None], zero[:, None])
    other = bradley_terry_loss(noisy_log_odds(margin, zero, zero, zero)[:, None], zero[:, None])
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=0)


def test_great_noise_makes_a_coin_of_every_preference():
    assert noisy_log_odds(ZERO + 5, ZERO, ZERO + 40, ZERO).item() == pytest.approx(0.0, abs=1e-7)


def test_great_differences_stay_finite_with_their_gradient():
    margin = torch.tensor([60.0, -60.0], requires_grad=True)
    log_odds = noisy_log_odds(margin, torch.zeros(2), torch.zeros(2), torch.zeros(2))
    log_odds.sum().backward()
    assert torch.isfinite(log_odds).all()
    assert (margin.grad > 0).all()


def test_origin_and_unit_are_open():
    mean, noise = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = noisy_log_odds(mean[:3], mean[3:], noise[:3], noise[3:])
    scaled, louder = 3 * mean - 7, noise + 2 * math.log(3)
    torch.testing.assert_close(noisy_log_odds(scaled[:3], scaled[3:], louder[:3], louder[3:]), one)


@pytest.mark.parametrize("count", [5, 7])
def test_nothing_else_is_open(count):
    # All pairs of n responses fix 2n numbers but for two, at whatever values.
    values = torch.randn(2 * count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    i, j = torch.triu_indices(count, count, 1)

    def pairs(x):
        return noisy_log_odds(x[i], x[j], x[count + i], x[count + j])

    singular = torch.linalg.svdvals(torch.autograd.functional.jacobian(pairs, values))
    assert (singular > 1e-4 * singular[0]).sum() == 2 * count - 2
    assert singular[2 * count - 2 :].max() < 1e-12 * singular[0]


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="chosen_noise"):
        noisy_log_odds(torch.zeros(2), torch.zeros(2), torch.zeros(3), torch.zeros(2))
