"""Sums, means, variances and whitening under a mask."""

import numpy as np
import pytest
import torch

from lit_vapo.functional import Moments, masked_mean, masked_sum, masked_var, masked_whiten, moments
from lit_vapo.functional.masked import accumulation_dtype

NAN = float("nan")
# Row 0 counts 1, 2, 6; row 1 counts 3; row 2 counts nothing. In all: 1, 2, 6, 3.
X = torch.tensor([[1.0, 2.0, 6.0], [3.0, NAN, NAN], [NAN, NAN, NAN]])
MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])


def test_hand_worked_values():
    # Sum 12, mean 3; deviations -2, -1, 3, 0, their squares 14: variance 14/3, or 14/4 with ddof 0.
    assert masked_sum(X, MASK).item() == 12.0
    assert masked_mean(X, MASK).item() == 3.0
    torch.testing.assert_close(masked_var(X, MASK), torch.tensor(14 / 3))
    torch.testing.assert_close(masked_var(X, MASK, unbiased=False), torch.tensor(3.5))


def test_along_a_dimension():
    torch.testing.assert_close(masked_sum(X, MASK, dim=1), torch.tensor([9.0, 3.0, 0.0]))
    torch.testing.assert_close(masked_mean(X, MASK, dim=1), torch.tensor([3.0, 3.0, 0.0]))
    torch.testing.assert_close(masked_mean(X, MASK, dim=0), torch.tensor([2.0, 2.0, 6.0]))


def test_against_numpy():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 11, generator=generator, dtype=torch.float64)
    mask = torch.rand(7, 11, generator=generator) < 0.6
    kept = x[mask].numpy()
    torch.testing.assert_close(masked_mean(x, mask).item(), kept.mean().item())
    torch.testing.assert_close(masked_var(x, mask).item(), kept.var(ddof=1).item())
    white = masked_whiten(x, mask, eps=0.0)
    np.testing.assert_allclose(white[mask], (kept - kept.mean()) / kept.std(ddof=1), rtol=1e-12)
    assert white[~mask].abs().max() == 0.0


def test_whitened_has_no_mean_and_unit_variance():
    white = masked_whiten(X, MASK)
    torch.testing.assert_close(masked_mean(white, MASK), torch.tensor(0.0), atol=1e-7, rtol=0)
    torch.testing.assert_close(masked_var(white, MASK), torch.tensor(1.0))
    assert white[~MASK].tolist() == [0.0] * 5


def test_a_large_offset_does_not_spoil_the_variance():
    # In float32, 1e4 + {0, 1} squared loses the difference; float64 sums keep it.
    x = 1e4 + torch.tensor([0.0, 1.0, 0.0, 1.0])
    mask = torch.ones(4, dtype=torch.bool)
    torch.testing.assert_close(masked_var(x, mask), torch.tensor(1 / 3))
    root = 3**0.5 / 2
    torch.testing.assert_close(masked_whiten(x, mask), torch.tensor([-root, root, -root, root]))


def test_moments_of_parts_add_to_those_of_the_whole():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 5, generator=generator)
    mask = torch.rand(6, 5, generator=generator) < 0.5
    parts = [moments(x[rows], mask[rows]) for rows in (slice(0, 1), slice(1, 6))]
    whole = Moments(*(sum(field) for field in zip(*parts, strict=True)))
    assert whole.count == mask.sum()
    assert whole.sum.dtype == torch.float64
    split = torch.cat([masked_whiten(x[:1], mask[:1], whole), masked_whiten(x[1:], mask[1:], whole)])
    torch.testing.assert_close(split, masked_whiten(x, mask))
    assert not torch.allclose(split[1:], masked_whiten(x[1:], mask[1:]))


def test_one_value_or_none_gives_zeros():
    one = torch.tensor([False, True])
    none = torch.tensor([False, False])
    x = torch.tensor([NAN, 5.0])
    assert masked_var(x, one).item() == 0.0
    assert masked_whiten(x, one).tolist() == [0.0, 0.0]
    assert masked_mean(x, none).item() == 0.0
    assert masked_var(x, none).item() == 0.0
    assert masked_whiten(x, none).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("count", [3, 7, 11])
@pytest.mark.parametrize("value", [0.1, 54321.12345, 123456.789])
def test_whitening_a_constant_stays_finite(count, value):
    # In float64 the rounded variance of 3 times 123456.789 is -4e-6, of 7 times 54321.12345 it is -1e-6.
    mask = torch.ones(count, dtype=torch.bool)
    x = torch.full((count,), value, dtype=torch.float64)
    torch.testing.assert_close(masked_whiten(x, mask), torch.zeros_like(x), atol=0.01, rtol=0)


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_var, masked_whiten])
def test_nan_in_padding_reaches_neither_value_nor_gradient(function):
    generator = torch.Generator().manual_seed(2)
    coefficients = torch.randn(3, 3, generator=generator)
    gradients = []
    for padding in (NAN, 0.0):
        x = torch.where(MASK, X, padding).requires_grad_()
        value = function(x, MASK)
        (value * (coefficients if value.ndim else 1.0)).sum().backward()
        assert torch.isfinite(value).all()
        gradients.append(x.grad)
    assert gradients[0][MASK].abs().sum() > 0
    assert gradients[0][~MASK].abs().max() == 0.0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_integers_give_floats_and_half_precision_keeps_its_dtype():
    mask = torch.tensor([True, True])
    assert masked_mean(torch.tensor([1, 2]), mask).item() == 1.5
    assert masked_mean(torch.tensor([True, False]), mask).item() == 0.5
    assert masked_whiten(torch.ones(2, dtype=torch.bfloat16), mask).dtype == torch.bfloat16


def test_devices_without_float64_accumulate_in_float32():
    assert accumulation_dtype(torch.device("mps")) == torch.float32
    assert accumulation_dtype(torch.device("cuda")) == torch.float64


def test_bad_masks_are_refused():
    with pytest.raises(ValueError, match=r"expected a mask of dtype torch.bool .* got torch.int64"):
        masked_mean(torch.ones(2), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"expected a mask of shape \(2,\), as x, got \(1,\)"):
        masked_sum(torch.ones(2), torch.tensor([True]))
