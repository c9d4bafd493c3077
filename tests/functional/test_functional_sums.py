"""Weighted sums of estimates: by hand, against a loop and against draws, and in their limits."""

import pytest
import torch

from lit_vapo.functional import ensemble_estimate, weighted_estimate
from lit_vapo.types import RewardEstimate


def ensemble(count, members, seed, unit=1.0):
    estimate = ensemble_estimate(torch.randn(count, members, generator=torch.Generator().manual_seed(seed)))
    return estimate._replace(reference_variance=torch.tensor(unit))


def exact(*values):
    return ensemble_estimate(torch.tensor(values)[:, None])


def test_by_hand():
    # Members 1 and 3: mean 2, σ² = 2. Members 0, 4: mean 2, σ² = 8. With weights 1 and -1/2 and an exact 5 of weight 2:
    # mean 2 - 1 + 10 = 11; σ² = 2 + 8/4 = 4. Side by side, the members are 1 - 0 + 10 = 11 and 3 - 2 + 10 = 11.
    one, other = (ensemble_estimate(torch.tensor([x])) for x in ([1.0, 3.0], [0.0, 4.0]))
    one, other = (
        one._replace(reference_variance=torch.tensor(3.0)),
        other._replace(reference_variance=torch.tensor(8.0)),
    )
    args = ([one, other, exact(5.0)], [1.0, -0.5, 2.0], [2, 2, 1])
    apart, together = weighted_estimate(*args), weighted_estimate(*args, aligned=True)
    assert (apart.mean.tolist(), apart.variance.tolist(), apart.members) == ([11.0], [4.0], None)
    assert apart.reference_variance.item() == 5.0
    assert (together.mean.tolist(), together.variance.tolist()) == ([11.0], [0.0])
    assert together.members.tolist() == [[11.0, 11.0]]
    # It depends on how the sources vary together, which nobody has measured.
    assert together.reference_variance is None


def test_independent_sources_add_as_draws_do():
    # N draws of each source, independent: the variance of their weighted sum is Σ w²·σ².
    draws = torch.randn(3, 200_000, generator=torch.Generator().manual_seed(0)).double() * torch.tensor(
        [[1.0], [2.0], [0.5]]
    )
    weights = [1.0, -0.7, 3.0]
    estimates = [RewardEstimate(x.mean()[None], x.var()[None], None) for x in draws]
    found = weighted_estimate(estimates, weights, [9, 9, 9])
    whole = sum(w * x for w, x in zip(weights, draws, strict=True))
    torch.testing.assert_close(found.mean[0], whole.mean())
    torch.testing.assert_close(found.variance[0], whole.var(), rtol=0.02, atol=0)


def test_aligned_sources_add_member_by_member():
    one, other, constant = ensemble(5, 4, 0), ensemble(5, 4, 1), exact(1.0, 2.0, 3.0, 4.0, 5.0)
    found = weighted_estimate([one, constant, other], [2.0, 10.0, -1.0], [4, 1, 4], aligned=True)
    for i in range(5):
        row = [2.0 * one.members[i, k] - other.members[i, k] + 10.0 * (i + 1) for k in range(4)]
        torch.testing.assert_close(found.members[i], torch.stack(row))
        torch.testing.assert_close(found.variance[i], torch.stack(row).var())
        torch.testing.assert_close(found.mean[i], torch.stack(row).mean())


@pytest.mark.parametrize("aligned", [False, True])
def test_one_source_with_a_variance_keeps_its_members(aligned):
    # Its own variance, which need not be that of its members (a posterior's is exact).
    one = ensemble(3, 4, 0, unit=2.0)._replace(variance=torch.tensor([1.0, 2.0, 3.0]))
    found = weighted_estimate([exact(1.0, 2.0, 3.0), one], [1.0, 3.0], [1, 4], aligned)
    torch.testing.assert_close(found.members, 3.0 * one.members + torch.tensor([[1.0], [2.0], [3.0]]))
    assert found.variance.tolist() == [9.0, 18.0, 27.0]
    assert found.reference_variance.item() == 18.0


def test_a_sum_of_one_is_that_one():
    one = ensemble(4, 3, 0, unit=0.3)
    found = weighted_estimate([one, ensemble(4, 5, 1)], [1.0, 0.0], [3, 5])
    assert all(torch.equal(x, y) for x, y in zip(found[:4], one[:4], strict=True))


def test_exact_sources_have_one_member_and_no_variance():
    found = weighted_estimate([exact(1.0, 2.0), exact(3.0, 5.0)], [1.0, 2.0], [1, 1])
    assert found.members.tolist() == [[7.0], [12.0]]
    assert found.variance.tolist() == [0.0, 0.0]
    assert found.reference_variance is None


def test_the_unit_is_unknown_where_one_is():
    unmeasured = ensemble(2, 3, 1)._replace(reference_variance=None)
    assert weighted_estimate([ensemble(2, 3, 0), unmeasured], [1.0, 1.0], [3, 3]).reference_variance is None


def test_it_applies_where_any_source_does():
    some, others = torch.tensor([True, False, False]), torch.tensor([False, True, False])
    one, other = exact(1.0, 0.0, 0.0)._replace(applies=some), exact(0.0, 2.0, 0.0)._replace(applies=others)
    assert weighted_estimate([one, other], [1.0, 1.0], [1, 1]).applies.tolist() == [True, True, False]
    assert weighted_estimate([one, exact(1.0, 1.0, 1.0)], [1.0, 1.0], [1, 1]).applies is None
    # One of weight 0 only watches.
    watched = weighted_estimate([one, exact(1.0, 1.0, 1.0)], [1.0, 0.0], [1, 1])
    assert watched.applies.tolist() == [True, False, False]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="expected as many weights and counts as estimates, got 1, 2"):
        weighted_estimate([exact(1.0), exact(1.0)], [1.0], [1, 1])
    with pytest.raises(ValueError, match=r"expected a weight other than 0, got \[0.0\]"):
        weighted_estimate([exact(1.0)], [0.0], [1])
