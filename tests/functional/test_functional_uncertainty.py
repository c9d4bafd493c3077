"""Spread against error: scikit-learn, scipy, brute-force loops, values worked by hand, limits."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from sklearn.metrics import roc_auc_score

from lit_vapo.functional import auroc, disagreement, fit_temperature, preference_nll, risk_coverage, spearman


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def coarse(generator):
    """200 values of which many are equal."""
    return torch.randint(0, 12, (200,), generator=generator).double() / 7


def test_auroc_hand_worked():
    # Positives 2 and 3, negatives 1 and 2. Pairs: 2>1, 2=2 (half), 3>1, 3>2: 3.5 of 4.
    scores = torch.tensor([2.0, 1.0, 3.0, 2.0])
    positives = torch.tensor([True, False, True, False])
    assert auroc(scores, positives).item() == 0.875
    assert auroc(scores, ~positives).item() == 0.125


def test_auroc_against_sklearn_with_ties(coarse, generator):
    positives = torch.rand(200, generator=generator) < coarse / 2
    expected = roc_auc_score(positives.numpy(), coarse.numpy())
    assert auroc(coarse, positives).item() == pytest.approx(expected, rel=1e-12)
    # Only the order of the scores counts.
    assert auroc(coarse.exp() - 5, positives).item() == pytest.approx(expected, rel=1e-12)


def test_auroc_limits():
    scores = torch.arange(4.0)
    assert auroc(scores, scores > 1).item() == 1
    assert auroc(scores, scores < 2).item() == 0
    assert auroc(torch.zeros(4), scores > 1).item() == 0.5
    assert auroc(torch.tensor([math.inf, 0.0]), torch.tensor([True, False])).item() == 1
    assert math.isnan(auroc(scores, scores > 9))
    assert math.isnan(auroc(scores, scores < 9))


def test_spearman_hand_worked():
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: deviations (-1.5, 0, 0, 1.5) and (-1.5, -0.5, 0.5, 1.5);
    # 4.5 / sqrt(4.5 * 5) = sqrt(0.9).
    found = spearman(torch.tensor([1.0, 5.0, 5.0, 9.0]), torch.tensor([0.0, 1.0, 8.0, 9.0]))
    assert found.item() == pytest.approx(math.sqrt(0.9), rel=1e-6)


def test_spearman_against_scipy_with_ties(coarse, generator):
    other = (coarse + torch.randn(200, generator=generator)).round()
    expected = stats.spearmanr(coarse.numpy(), other.numpy()).statistic
    assert spearman(coarse, other).item() == pytest.approx(expected, rel=1e-12)


def test_spearman_limits():
    a = torch.tensor([3.0, 1.0, 2.0])
    assert spearman(a, a.exp()).item() == pytest.approx(1)
    assert spearman(a, -a).item() == pytest.approx(-1)
    assert math.isnan(spearman(a, torch.ones(3)))


def test_risk_coverage_hand_worked():
    # By uncertainty the errors are 0, 1, 0, 1: risks 0, 1/2, 1/3, 1/2, area 4/12. Best: 0, 0, 1/3, 1/2, area 5/24.
    curve = risk_coverage(torch.tensor([0.4, 0.2, 0.1, 0.3]), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert curve.risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert curve.area.item() == pytest.approx(1 / 3)
    assert curve.best_area.item() == pytest.approx(5 / 24)


def test_risk_coverage_is_the_mean_over_all_orders_of_ties():
    uncertainty = np.array([1, 1, 1, 2, 0, 2])
    error = np.array([1, 0.5, 0, 1, 0.5, 0])
    curves = []
    for order in itertools.permutations(range(6)):
        if (np.diff(uncertainty[list(order)]) >= 0).all():
            curves.append(np.cumsum(error[list(order)]) / np.arange(1, 7))
    assert len(curves) == 12
    found = risk_coverage(torch.from_numpy(uncertainty).double(), torch.from_numpy(error))
    np.testing.assert_allclose(found.risk, np.mean(curves, axis=0), rtol=1e-12)
    assert found.area.item() == pytest.approx(np.mean(curves))
    assert found.best_area.item() == pytest.approx(np.mean(np.cumsum(np.sort(error)) / np.arange(1, 7)))


def test_risk_coverage_limits(coarse, generator):
    error = torch.rand(200, generator=generator, dtype=torch.float64).round(decimals=2)
    flat = risk_coverage(torch.zeros(200, dtype=torch.float64), error)
    torch.testing.assert_close(flat.risk, error.mean().expand(200))
    perfect = risk_coverage(error, error)
    torch.testing.assert_close(perfect.area, perfect.best_area)
    some = risk_coverage(coarse, error)
    assert perfect.area < some.area < risk_coverage(-error, error).area
    torch.testing.assert_close(some.risk[-1], error.mean())
    shuffled = torch.randperm(200, generator=generator)
    torch.testing.assert_close(risk_coverage(coarse[shuffled], error[shuffled]), some)


def test_disagreement_hand_worked():
    # Agree; one dissents; one has no opinion; nobody has one: 2 of 4.
    members = torch.tensor([[1.0, 2.0, 0.1], [-1.0, -2.0, 0.1], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert disagreement(members).item() == 0.5
    assert disagreement(-members).item() == 0.5
    assert disagreement(members[:, :1]).item() == 0


def test_disagreement_against_a_loop(generator):
    members = torch.randn(100, 4, generator=generator) + 1
    expected = np.mean([len({m > 0 for m in row}) > 1 for row in members.tolist()])
    assert 0.2 < expected < 0.8
    assert disagreement(members).item() == pytest.approx(expected)


def test_temperature_hand_worked():
    # One confidence and three of four right: the best probability is 3/4, a margin of log 3.
    margins = torch.tensor([1.0, 1.0, -1.0, 1.0])
    assert fit_temperature(5 * margins).item() == pytest.approx(5 / math.log(3), rel=1e-6)
    # The same said by a probability of 3/4 in every pair.
    assert fit_temperature(5 * torch.ones(2), torch.tensor([0.75, 0.75])).item() == pytest.approx(5 / math.log(3))


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("soft", [False, True])
def test_temperature_against_scipy(scale, soft, generator):
    true = torch.randn(400, generator=generator, dtype=torch.float64) * 2
    if soft:
        probability = torch.sigmoid(true + 0.3 * torch.randn(400, generator=generator, dtype=torch.float64))
        margins = scale * true
    else:
        probability = None
        right = torch.rand(400, generator=generator) < torch.sigmoid(true)
        margins = scale * torch.where(right, true, -true)
    p = np.ones(400) if probability is None else probability.numpy()

    def loss(log_temperature):
        z = margins.numpy() / math.exp(log_temperature)
        return np.mean(p * np.logaddexp(0, -z) + (1 - p) * np.logaddexp(0, z))

    best = optimize.minimize_scalar(loss, bounds=(math.log(1e-2), math.log(1e2)), options={"xatol": 1e-10})
    found = fit_temperature(margins, probability)
    assert found.item() == pytest.approx(math.exp(best.x), rel=1e-5)
    assert found.item() == pytest.approx(scale, rel=0.3)


def test_temperature_undoes_a_scale(generator):
    margins = torch.randn(300, generator=generator, dtype=torch.float64) + 0.7
    once = fit_temperature(margins)
    torch.testing.assert_close(fit_temperature(3 * margins), 3 * once)
    torch.testing.assert_close(fit_temperature(margins / once), torch.ones((), dtype=torch.float64))
    assert preference_nll(margins / once) < preference_nll(margins)


def test_temperature_is_bounded():
    assert fit_temperature(torch.tensor([1.0, 2.0])).item() == pytest.approx(1e-2)
    assert fit_temperature(torch.tensor([1e4, 1e-30])).item() == pytest.approx(1e-2)
    assert fit_temperature(torch.tensor([-1.0, -2.0])).item() == pytest.approx(1e2)
    assert fit_temperature(torch.tensor([-1e4, 1.0])).item() == pytest.approx(1e2)
    assert fit_temperature(torch.zeros(3)).item() == 1


def test_bad_arguments_are_refused():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"expected scores of shape \(N,\) with N >= 1, got \(0,\)"):
        auroc(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected positives of torch.bool, got torch.float32"):
        auroc(x, x)
    with pytest.raises(ValueError, match=r"expected positives of shape \(3,\), as scores, got \(2,\)"):
        auroc(x, torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected b without NaN, got 1 in 3"):
        spearman(x, torch.tensor([0.0, math.nan, 1.0]))
    with pytest.raises(ValueError, match=r"expected error of shape \(3,\), as uncertainty, got \(2,\)"):
        risk_coverage(x, x[:2])
    with pytest.raises(ValueError, match=r"expected members of shape \(N, K\) with N, K >= 1, got \(3, 0\)"):
        disagreement(torch.zeros(3, 0))
    with pytest.raises(ValueError, match=r"expected probability in \[0, 1\], got 0 to 1.5"):
        fit_temperature(x, torch.tensor([0.0, 1.0, 1.5]))
