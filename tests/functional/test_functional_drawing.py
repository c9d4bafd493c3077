"""Draws from categorical distributions: by hand, against frequencies, and two at once."""

import pytest
import torch

from lit_vapo.functional import draw


def test_the_shortest_time_for_its_probability_wins():
    # E / p: 2, 4, 3; then 4, 3, 5.
    rows = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    times = torch.tensor([[1.0, 1.0, 0.75], [0.4, 0.6, 3.5]])
    assert draw(rows, times).tolist() == [0, 1]


def test_what_has_probability_zero_is_never_drawn():
    rows = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).repeat(20_000, 1)
    assert sorted(draw(rows).unique().tolist()) == [1, 3]
    # However long the others take.
    assert draw(rows[:1], torch.tensor([[1e-9, 16.6, 1e-9, 16.5, 1e-9]])).tolist() == [3]


@pytest.mark.parametrize(
    ("bits", "drawn"),
    [([0, 0, 0], 2), ([2**31 - 1] * 3, 2), ([1, 9, 22], 1), ([1, 9, 20], 2)],
    ids=["shortest", "longest", "ratio below that of p", "ratio above it"],
)
def test_times_are_as_fine_as_their_random_bits(bits, drawn, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "random_", lambda x: x.copy_(torch.tensor([bits])))
    assert draw(torch.tensor([[0.0, 0.3, 0.7]])).tolist() == [drawn]


def test_a_row_need_not_sum_to_one():
    rows = torch.rand(500, 7)
    times = torch.rand(500, 7) + 1e-6
    assert torch.equal(draw(rows, times), draw(4 * rows, times))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frequencies_are_the_probabilities(dtype):
    # Chi-square with 9 degrees of freedom: 27.9 is its 99.9% quantile.
    p = torch.arange(1.0, 11.0, dtype=dtype) / 55
    counts = torch.bincount(draw(p.expand(20_000, 10)), minlength=10)
    expected = 20_000 * p
    assert float(((counts - expected) ** 2 / expected).sum()) < 27.9


def test_the_unlikely_is_as_unlikely_as_it_should_be():
    # 4095 words of 2e-6 beside one: 164 of 20,000 draws, ± 12.8. Half are of either half of the words.
    rows = torch.full((20_000, 4096), 2e-6)
    rows[:, 0] = 1 - 4095 * 2e-6
    found = torch.cat([draw(part) for part in rows.split(2000)])
    others = found[found > 0]
    assert abs(len(others) - 164) < 4 * 12.8
    assert abs(int((others > 2048).sum()) - len(others) / 2) < 4 * (len(others) / 4) ** 0.5


@pytest.mark.parametrize("distance", [0.02, 0.2])
def test_two_near_distributions_mostly_draw_the_same(distance):
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(64, generator=generator).softmax(-1)
    q = p.clone()
    # Some of the mass moves from the first half to the second.
    q[:32] *= 1 - distance / p[:32].sum()
    q[32:] *= 1 + distance / p[32:].sum()
    assert float((p - q).abs().sum() / 2) == pytest.approx(distance, rel=1e-4)
    times = -torch.rand(20_000, 64, generator=generator).clamp_min(1e-9).log()
    same = (draw(p.expand_as(times), times) == draw(q.expand_as(times), times)).double().mean()
    # Two minima of the same exponential times agree so often (arXiv 2408.07978).
    exact = sum(1 / torch.maximum(p / p[i], q / q[i]).sum() for i in range(64))
    assert float(same) == pytest.approx(float(exact), abs=4 * (0.25 / 20_000) ** 0.5)
    assert float(exact) >= (1 - distance) / (1 + distance)
