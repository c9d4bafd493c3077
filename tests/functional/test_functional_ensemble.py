"""Ensemble statistics, normalisation and the Poisson bootstrap."""

import numpy as np
import pytest
import torch
from scipy import stats

from lit_vapo.functional import (
    ensemble_estimate,
    example_uniforms,
    fit_normaliser,
    margin_estimate,
    normalise_members,
    nuclear_diversity,
    poisson_bootstrap,
)
from lit_vapo.functional.ensemble import _signed, _splitmix64


@pytest.fixture
def members():
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(0))


def test_estimate_hand_worked():
    # 1, 2, 6: mean 3, deviations -2, -1, 3, variance 14/2.
    estimate = ensemble_estimate(torch.tensor([[1.0, 2.0, 6.0]]))
    assert estimate.mean.tolist() == [3.0]
    assert estimate.variance.tolist() == [7.0]
    assert estimate.members.tolist() == [[1.0, 2.0, 6.0]]


def test_estimate_against_numpy_and_under_permutation(members):
    estimate = ensemble_estimate(members)
    np.testing.assert_allclose(estimate.variance, members.numpy().var(axis=1, ddof=1), rtol=1e-5)
    permuted = ensemble_estimate(members[:, [3, 1, 4, 0, 2]])
    torch.testing.assert_close(permuted.mean, estimate.mean)
    torch.testing.assert_close(permuted.variance, estimate.variance)


def test_one_member_has_no_variance():
    estimate = ensemble_estimate(torch.tensor([[1.0], [2.0]]))
    assert estimate.variance.tolist() == [0.0, 0.0]


def test_margin_hand_worked():
    # Differences 1 and 3: mean 2, variance 2; the two variances alone would be 0.5 and 4.5.
    estimate = margin_estimate(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, -2.0]]))
    assert estimate.mean.tolist() == [2.0]
    assert estimate.variance.tolist() == [2.0]


def test_margin_variance_ignores_an_offset_that_a_member_gives_both_responses(members):
    chosen, rejected = members[:4], members[4:]
    offset = torch.tensor([100.0, -3.0, 0.0, 7.0, 50.0])
    plain = margin_estimate(chosen, rejected)
    shifted = margin_estimate(chosen + offset, rejected + offset)
    torch.testing.assert_close(shifted.variance, plain.variance, rtol=1e-4, atol=1e-5)
    assert (ensemble_estimate(chosen + offset).variance > 100 * plain.variance).all()


def test_normalising_on_reference_responses_removes_offset_and_scale(members):
    moved = members * torch.tensor([1.0, 10.0, 0.1, 2.0, 5.0]) + torch.tensor([0.0, 50.0, -3.0, 1.0, 9.0])
    normalised = normalise_members(moved, *fit_normaliser(moved))
    torch.testing.assert_close(normalised.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.std(0), torch.ones(5), rtol=1e-5, atol=0)
    torch.testing.assert_close(normalised, normalise_members(members, *fit_normaliser(members)), rtol=1e-4, atol=1e-5)


def test_a_constant_member_gets_the_floor():
    loc, scale = fit_normaliser(torch.tensor([[2.0, 0.0], [2.0, 1.0]]), scale_floor=0.01)
    torch.testing.assert_close(loc, torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(scale, torch.tensor([0.01, 0.5**0.5]))


def test_normaliser_names_the_member_that_is_not_finite():
    scores = torch.zeros(4, 3)
    scores[1:3, 2] = float("nan")
    with pytest.raises(ValueError, match="got 2 of 4 scores not finite for member 2"):
        fit_normaliser(scores)


def test_bad_shapes_are_refused(members):
    with pytest.raises(ValueError, match="expected at least 2 responses to fit a normaliser, got 1"):
        fit_normaliser(members[:1])
    with pytest.raises(ValueError, match=r"expected members of shape \(B, K\) with K >= 1, got \(8,\)"):
        ensemble_estimate(members[:, 0])
    with pytest.raises(ValueError, match=r"expected scale of shape \(5,\), got \(4,\)"):
        normalise_members(members, torch.zeros(5), torch.ones(4))
    with pytest.raises(ValueError, match=r"expected rejected of shape \(8, 5\), as chosen, got \(8, 4\)"):
        margin_estimate(members, members[:, :4])
    with pytest.raises(ValueError, match="expected scale_floor > 0, got 0"):
        fit_normaliser(members, scale_floor=0.0)


def test_splitmix64_gives_the_published_stream():
    # The generator seeded with 1234567 hashes seed, seed + golden, …: the first outputs of Vigna's C code.
    golden = 0x9E3779B97F4A7C15
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = torch.tensor([_signed(1234567 + n * golden) for n in range(4)])
    assert [x % 2**64 for x in _splitmix64(states).tolist()] == expected


UNIFORMS = example_uniforms(torch.arange(20_000), count=3, seed=0)


def test_uniforms_are_uniform_and_independent_between_places_examples_and_seeds():
    for column in UNIFORMS.T:
        assert stats.kstest(column, "uniform").pvalue > 0.01
    columns = [*UNIFORMS.T, UNIFORMS[:, 0].roll(1), example_uniforms(torch.arange(20_000), 1, seed=1)[:, 0]]
    correlation = np.corrcoef(torch.stack(columns)) - np.eye(5)
    assert abs(correlation).max() < 4 / 20_000**0.5
    assert 0 <= UNIFORMS.min() < UNIFORMS.max() < 1


def test_uniforms_belong_to_the_example():
    order = torch.randperm(20_000)
    torch.testing.assert_close(example_uniforms(order, 2, seed=2**64), UNIFORMS[order, :2], atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"expected example_ids \(B,\) of torch.int64, got \(2,\) of torch.int32"):
        example_uniforms(torch.zeros(2, dtype=torch.int32), 2, 0)


COUNTS = poisson_bootstrap(torch.arange(50_000), num_members=4, seed=0)


def test_counts_are_poisson_with_mean_and_variance_one():
    # Standard error of a mean of 50,000 counts is 0.0045.
    torch.testing.assert_close(COUNTS.mean(0), torch.ones(4), atol=0.02, rtol=0)
    torch.testing.assert_close(COUNTS.var(0), torch.ones(4), atol=0.03, rtol=0)
    observed = np.bincount(COUNTS.flatten().long().clamp(max=6).numpy(), minlength=7)
    probabilities = np.append(stats.poisson.pmf(np.arange(6), 1.0), stats.poisson.sf(5, 1.0))
    assert stats.chisquare(observed, probabilities * observed.sum()).pvalue > 1e-3


def test_counts_are_independent_between_members_ids_and_seeds():
    columns = [*COUNTS.T, COUNTS[:, 0].roll(1), poisson_bootstrap(torch.arange(50_000), 1, seed=1)[:, 0]]
    correlation = np.corrcoef(torch.stack(columns).numpy())
    # Six columns, 50,000 rows: a correlation has standard error 0.0045.
    assert np.abs(correlation - np.eye(6)).max() < 0.02
    table = np.histogram2d(COUNTS[:, 0].clamp(max=3), COUNTS[:, 1].clamp(max=3), bins=4)[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_counts_depend_on_nothing_but_seed_member_and_id():
    ids = torch.tensor([-(2**63), -1, 0, 5, 2**62, 2**63 - 1])
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    counts = poisson_bootstrap(ids, 6, seed=3)
    torch.testing.assert_close(poisson_bootstrap(ids[order], 6, seed=3), counts[order])
    torch.testing.assert_close(poisson_bootstrap(ids[2:3], 2, seed=3), counts[2:3, :2])
    torch.testing.assert_close(poisson_bootstrap(ids, 6, seed=3 + 2**64), counts)
    assert counts.dtype == torch.float32
    assert not torch.equal(poisson_bootstrap(ids, 6, seed=4), counts)


def test_counts_are_the_same_in_every_release():
    # Worked out with Python's unbounded integers: a checkpoint's members must keep their bootstrap for ever.
    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    counts = poisson_bootstrap(torch.arange(40), 3, seed=11)
    for example in range(40):
        for member in range(3):
            uniform = (mix(mix(mix(11) + member) + mix(example)) >> 1) / 2**63
            assert counts[example, member] == stats.poisson.ppf(uniform, 1.0)


def test_bad_bootstrap_arguments_are_refused():
    with pytest.raises(ValueError, match=r"expected example_ids \(B,\) of torch.int64, got \(2,\) of torch.int32"):
        poisson_bootstrap(torch.zeros(2, dtype=torch.int32), 2, 0)
    with pytest.raises(ValueError, match="expected num_members >= 1, got 0"):
        poisson_bootstrap(torch.zeros(2, dtype=torch.int64), 0, 0)


def test_nuclear_diversity_by_hand():
    # Rows (3, 0) and (0, 4): singular values 4 and 3, norm 5, rank 2: 7 / (√2·5).
    matrices = torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]]])
    assert nuclear_diversity(matrices).item() == pytest.approx(7 / (2**0.5 * 5))
    torch.testing.assert_close(nuclear_diversity(100 * matrices), nuclear_diversity(matrices))


def test_nuclear_diversity_tells_members_apart():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1, 2, 8, generator=generator)
    same, other = one.expand(3, -1, -1), torch.randn(3, 2, 8, generator=generator)
    assert nuclear_diversity(same) < nuclear_diversity(other) <= 1
    # Following the gradient makes near copies differ.
    near = (same + 0.01 * other).requires_grad_(True)
    before = nuclear_diversity(near)
    (gradient,) = torch.autograd.grad(before, near)
    assert nuclear_diversity(near + 0.1 * gradient) > before
    with pytest.raises(ValueError, match=r"expected matrices of shape \(K, r, n\), got \(2, 8\)"):
        nuclear_diversity(one[0])
