"""Accuracy and calibration against scikit-learn and a brute-force loop."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss

from lit_vapo.functional import (
    brier,
    expected_calibration_error,
    preference_accuracy,
    preference_calibration_error,
    preference_nll,
    reliability_curve,
)


@pytest.fixture
def margins():
    return torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 0.5


def test_hand_worked_values():
    # Margins log 3, 0, -log 3: probabilities 3/4, 1/2, 1/4.
    m = torch.tensor([math.log(3.0), 0.0, -math.log(3.0)])
    torch.testing.assert_close(preference_accuracy(m), torch.tensor(0.5))
    torch.testing.assert_close(preference_nll(m), torch.tensor((math.log(4 / 3) + math.log(2) + math.log(4)) / 3))
    torch.testing.assert_close(brier(m), torch.tensor((1 / 16 + 1 / 4 + 9 / 16) / 3))


def test_ece_hand_worked():
    # Two bins, one of two correct in each: low 0.1, 0.3, gap 0.3; high 0.9, 0.9, gap 0.4. (0.3 + 0.4) / 2.
    probabilities = torch.tensor([0.1, 0.3, 0.9, 0.9])
    correct = torch.tensor([True, False, True, False])
    torch.testing.assert_close(expected_calibration_error(probabilities, correct, bins=2), torch.tensor(0.35))


def test_preference_ece_hand_worked():
    # Confidence 3/4 four times, right twice, a tie of margin 0 apart: |0.5 - 0.75| * 4/5 + |0.5 - 0.5| * 1/5.
    m = math.log(3.0) * torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0])
    torch.testing.assert_close(preference_calibration_error(m), torch.tensor(0.2))
    # Confidence 3/4 five times, right four times, and 0.9 once, wrong.
    # In bins of their own: |0.8 - 0.75| * 5/6 + |0 - 0.9| * 1/6 = 1.15/6. In one: |4/6 - 4.65/6| = 0.65/6.
    m = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -2.0]) * math.log(3.0)
    torch.testing.assert_close(preference_calibration_error(m, bins=10), torch.tensor(1.15 / 6))
    torch.testing.assert_close(preference_calibration_error(m, bins=2), torch.tensor(0.65 / 6))


def test_nll_and_brier_against_sklearn(margins):
    probabilities = torch.sigmoid(margins).numpy()
    ones = np.ones(len(probabilities))
    for k in range(3):
        p = probabilities[:, k]
        torch.testing.assert_close(preference_nll(margins)[k].item(), log_loss(ones, p, labels=[0, 1]))
        torch.testing.assert_close(brier(margins)[k].item(), brier_score_loss(ones, p, pos_label=1))


def test_nll_and_brier_do_not_care_which_side_was_written_first(margins):
    # Half of the pairs turned round: label 0, probability 1 - p.
    probabilities = torch.sigmoid(margins[:, 0]).numpy()
    labels = np.arange(200) % 2
    turned = np.where(labels == 1, probabilities, 1 - probabilities)
    torch.testing.assert_close(preference_nll(margins[:, 0]).item(), log_loss(labels, turned))
    torch.testing.assert_close(brier(margins[:, 0]).item(), brier_score_loss(labels, turned))


@pytest.mark.parametrize("bins", [1, 5, 10, 15])
def test_ece_against_a_loop(bins):
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.rand(300, 2, generator=generator, dtype=torch.float64)
    probabilities[0], probabilities[1] = 0.0, 1.0
    correct = torch.rand(300, 2, generator=generator) < probabilities**2
    expected = []
    for k in range(2):
        error = 0.0
        for b in range(bins):
            inside = [
                (p, c)
                for p, c in zip(probabilities[:, k].tolist(), correct[:, k].tolist(), strict=True)
                if b / bins <= p < (b + 1) / bins or (b == bins - 1 and p == 1.0)
            ]
            if inside:
                p, c = np.mean(inside, axis=0)
                error += len(inside) / 300 * abs(c - p)
        expected.append(error)
    got = expected_calibration_error(probabilities, correct, bins)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_calibrated_predictions_have_little_error():
    generator = torch.Generator().manual_seed(2)
    true_margin = torch.randn(200_000, generator=generator) * 2
    won = torch.rand(200_000, generator=generator) < torch.sigmoid(true_margin)
    margins = torch.where(won, true_margin, -true_margin)
    assert preference_calibration_error(margins) < 0.005
    assert preference_calibration_error(3 * margins) > 0.05


def test_reliability_curve_hand_worked():
    # log 3 four times, right three times, and 2 log 3 (0.9) once, wrong: bins 0.7 to 0.8 and 0.9 to 1.
    m = torch.tensor([1.0, 1.0, 1.0, -1.0, -2.0]) * math.log(3.0)
    curve = reliability_curve(m)
    empty = float("nan")
    expected = torch.full((3, 10), empty)
    expected[:, 7], expected[:, 9] = torch.tensor([0.75, 0.75, 0.8]), torch.tensor([0.9, 0.0, 0.2])
    expected[2] = expected[2].nan_to_num(0)
    torch.testing.assert_close(torch.stack(curve), expected, equal_nan=True)


@pytest.mark.parametrize("bins", [1, 4, 10])
def test_reliability_curve_sums_to_the_calibration_error(margins, bins):
    for k in range(3):
        curve = reliability_curve(margins[:, k], bins)
        error = (curve.share * (curve.accuracy - curve.confidence).abs()).nansum()
        torch.testing.assert_close(error, preference_calibration_error(margins[:, k], bins))
        torch.testing.assert_close(curve.share.sum().item(), 1.0)


def test_members_are_columns(margins):
    for function in (preference_accuracy, preference_nll, brier, preference_calibration_error):
        together = function(margins)
        assert together.shape == (3,)
        alone = torch.stack([function(margins[:, k]) for k in range(3)])
        torch.testing.assert_close(together, alone)


def test_extreme_margins_stay_finite():
    m = torch.tensor([-1e4, 1e4])
    assert preference_nll(m).item() == 5e3
    assert brier(m).item() == 0.5
    assert preference_calibration_error(m).item() == 0.5


def test_bad_arguments_are_refused(margins):
    with pytest.raises(ValueError, match=r"expected margins of shape .* with B >= 1, got \(0,\)"):
        preference_accuracy(torch.zeros(0))
    with pytest.raises(ValueError, match=r"expected probabilities in \[0, 1\], got -?\d.* to \d"):
        expected_calibration_error(margins, margins)
    with pytest.raises(ValueError, match=r"expected probabilities in \[0, 1\], got nan"):
        expected_calibration_error(torch.tensor([float("nan")]), torch.ones(1))
    with pytest.raises(ValueError, match=r"expected correct of shape \(2,\), as probabilities, got \(1,\)"):
        expected_calibration_error(torch.zeros(2), torch.zeros(1))
    with pytest.raises(ValueError, match="expected bins >= 1, got 0"):
        expected_calibration_error(torch.zeros(2), torch.zeros(2), bins=0)
    with pytest.raises(ValueError, match="expected bins >= 1, got 0"):
        reliability_curve(torch.zeros(2), bins=0)
    with pytest.raises(ValueError, match=r"expected margins of shape \(N,\) with N >= 1, got \(200, 3\)"):
        reliability_curve(margins)
    with pytest.raises(ValueError, match=r"expected margins without NaN, got 1 in 2"):
        reliability_curve(torch.tensor([float("nan"), 0.0]))
