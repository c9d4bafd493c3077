"""Draws from categorical distributions: by hand, at the edges, against frequencies."""

import pytest
import torch

from lit_vapo.functional import draw


def test_the_cumulated_probability_that_passes_u_decides():
    # 0.1, 0.1, 0.4, 1.0 cumulated; the boundary belongs to the next index.
    rows = torch.tensor([[0.1, 0.0, 0.3, 0.6]], dtype=torch.float64).expand(6, 4)
    u = torch.tensor([0.0, 0.0999, 0.1, 0.3999, 0.4001, 0.9999], dtype=torch.float64)
    assert draw(rows, u).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_probability_zero_is_never_drawn(dtype):
    rows = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).repeat(3, 1)
    largest = torch.nextafter(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype))
    u = torch.stack([torch.zeros((), dtype=dtype), torch.full((), 0.5, dtype=dtype), largest])
    assert draw(rows, u).tolist() == [1, 3, 3]
    # One that rounds to the total, too.
    assert draw(rows[:1], torch.ones(1, dtype=dtype)).tolist() == [3]


def test_a_row_need_not_sum_to_one():
    u = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.rand(500, 7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw(rows, u), draw(3 * rows, u))


def test_frequencies_are_the_probabilities():
    # Chi-square with 9 degrees of freedom: 27.9 is its 99.9% quantile.
    p = torch.arange(1.0, 11.0) / 55
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(draw(p.expand(20_000, 10), u), minlength=10)
    expected = 20_000 * p
    assert float(((counts - expected) ** 2 / expected).sum()) < 27.9


def test_the_smallest_of_many_are_told_apart():
    # In float32, 50,000 times 1e-9 beside 1 would round to nothing.
    rows = torch.full((1, 50_001), 1e-9)
    rows[0, 0] = 1.0
    u = torch.tensor([1 - 2e-6], dtype=torch.float64)
    total = 1 + 5e-5
    by_hand = int(((1 - 2e-6) * total - 1) / 1e-9)
    assert abs(int(draw(rows, u)) - 1 - by_hand) <= 2
