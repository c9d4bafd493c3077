"""Win rates, gains and repetition, by hand and against scipy."""

import math

import pytest
import torch
from scipy import stats

from lit_vapo.functional import paired_gain, repetition, win_rate


def test_win_rate_by_hand():
    # Prompt 1: 2 > 1, 2 > 0, 1 = 1, 1 > 0: 3.5 of 4. Prompt 2: all lost.
    ours, theirs = torch.tensor([[2.0, 1.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [5.0, 5.0]])
    assert win_rate(ours, theirs).item() == pytest.approx(3.5 / 8)


def test_win_rate_against_scipy():
    ours, theirs = torch.randint(0, 5, (1, 30)), torch.randint(0, 5, (1, 20))
    expected = stats.mannwhitneyu(ours[0], theirs[0]).statistic / 600
    assert win_rate(ours.float(), theirs.float()).item() == pytest.approx(expected)


def test_win_rates_of_both_sides_are_one_together():
    ours, theirs = torch.randn(6, 3).round(), torch.randn(6, 2).round()
    assert (win_rate(ours, theirs) + win_rate(theirs, ours)).item() == pytest.approx(1)
    assert win_rate(ours, ours).item() == 0.5


def test_gain_by_hand_and_against_scipy():
    # Differences of the means 1 and -2: mean -1/2, deviation 3/√2, error 3/2.
    gain = paired_gain(torch.tensor([[2.0, 2.0], [0.0, 2.0]]), torch.tensor([[1.0], [3.0]]))
    assert (gain.mean.item(), gain.standard_error.item()) == pytest.approx((-0.5, 1.5))
    ours, theirs = torch.randn(40, 1), torch.randn(40, 1)
    gain = paired_gain(ours, theirs)
    expected = stats.ttest_rel(ours[:, 0], theirs[:, 0]).statistic
    assert (gain.mean / gain.standard_error).item() == pytest.approx(expected, rel=1e-5)
    assert math.isnan(paired_gain(ours[:1], theirs[:1]).standard_error)


@pytest.mark.parametrize("function", [win_rate, paired_gain])
@pytest.mark.parametrize("shape", [(3,), (3, 0), (4, 2)])
def test_shapes_that_do_not_fit_are_refused(function, shape):
    with pytest.raises(ValueError, match=r"expected scores of shapes \(P, N\) and \(P, M\) .* got \(3, 2\) and"):
        function(torch.zeros(3, 2), torch.zeros(shape))


def test_repetition_by_hand():
    # Word pairs: "a b", "b b", "a b": two distinct of three, one word said twice in a row. A word alone has no pair.
    found = repetition(["a b b", "A  b\n", "word", "word"])
    assert found == pytest.approx((2 / 3, 1 / 3, 3 / 4))


def test_repetition_of_nothing_is_not_defined():
    assert all(math.isnan(value) for value in repetition([]))
    found = repetition(["", "word"])
    assert math.isnan(found.distinct_pairs)
    assert found.distinct_responses == 1
