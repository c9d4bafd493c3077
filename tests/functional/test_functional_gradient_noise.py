"""The share of a gradient that is signal."""

import pytest
import torch

from lit_vapo.functional import gradient_signal


def test_hand_worked_values():
    # g1 = (3, 0), g2 = (1, 1): g1·g2 = 3, |g1| = 3, |g2| = √2, |g|² = 16 + 1. Cosine 1/√2; share 3 / (1/4 · 17).
    found = gradient_signal(torch.tensor([3.0, 0.0]), torch.tensor([4.0, 1.0]))
    torch.testing.assert_close(found.cosine, torch.tensor(0.5**0.5))
    torch.testing.assert_close(found.share, torch.tensor(12 / 17))
    # A third of the rows in the first half: 3 / (2/9 · 17).
    found = gradient_signal(torch.tensor([3.0, 0.0]), torch.tensor([4.0, 1.0]), 1 / 3)
    torch.testing.assert_close(found.share, torch.tensor(27 / 34))


def test_limits():
    half = torch.tensor([1.0, -2.0, 0.5])
    assert gradient_signal(half, 2 * half) == pytest.approx((1.0, 1.0))  # halves agree: all is signal
    cosine, share = gradient_signal(half, torch.zeros(3))  # they cancel
    assert cosine == -1.0
    assert share == -float("inf")
    assert gradient_signal(torch.zeros(3), half).cosine.isnan()
    assert gradient_signal(torch.zeros(3), torch.zeros(3)).share.isnan()
    # Halves of one norm: twice the cosine over one plus the cosine.
    cosine, share = gradient_signal(torch.tensor([1.0, 0.0]), torch.tensor([1.6, 0.8]))
    assert share == pytest.approx(2 * cosine.item() / (1 + cosine.item()))


@pytest.mark.parametrize(("rows", "first"), [(16, 8), (16, 5)])
def test_the_share_is_that_of_drawn_gradients(rows, first):
    # Rows are μ + noise of variance s² in each of P entries: of |g|² the share |μ|² / (|μ|² + P·s²/B) is signal, here
    # 1 / (1 + 400 · 0.04 / 16). Numerator and denominator are averaged apart, as their quotient is not unbiased.
    generator, mean = torch.Generator().manual_seed(0), torch.zeros(400, dtype=torch.float64)
    mean[0] = 1.0
    signal, squares = 0.0, 0.0
    for _ in range(500):
        each = mean + 0.2 * torch.randn(rows, 400, generator=generator, dtype=torch.float64)
        part, whole = each[:first].sum(0) / rows, each.mean(0)
        square = whole.square().sum()
        signal += gradient_signal(part, whole, first / rows).share * square
        squares += square
    assert signal / 500 == pytest.approx(1.0, abs=0.02)
    assert signal / squares == pytest.approx(0.5, abs=0.01)


def test_half_precision_is_summed_in_float32():
    first = torch.full((4096,), 0.1).bfloat16()
    found = gradient_signal(first, 2 * first)
    assert found.share.dtype == torch.float32
    assert found == pytest.approx((1.0, 1.0), abs=1e-5)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"expected whole of shape \(2,\), as first, got \(3,\)"):
        gradient_signal(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="expected first_share between 0 and 1, got 1.0"):
        gradient_signal(torch.zeros(2), torch.zeros(2), 1.0)
