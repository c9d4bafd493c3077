"""The verdict on an ensemble: figures worked by hand, and the sentences that follow from them."""

import dataclasses
import math

import pytest
import torch

from lit_vapo.evaluation.preference_report import PreferenceReport
from lit_vapo.evaluation.verdict import Findings, find, sentences
from lit_vapo.functional import Interval, auroc_interval, ensemble_estimate, share_interval

GOOD = Findings(
    num_pairs=200,
    accuracy=0.7,
    accuracy_interval=Interval(0.63, 0.76),
    longer_rewarded=0.55,
    longer_chosen=0.53,
    length_correlation=0.1,
    cut_effect=-0.2,
    num_errors=60,
    error_auroc=0.62,
    error_auroc_interval=Interval(0.54, 0.7),
    sigma_constant_share=0.1,
)
# What is bad about an ensemble, how the sentence on it begins, and what it names to try.
BAD = [
    ({"accuracy": 0.55, "accuracy_interval": Interval(0.48, 0.62)}, "not shown to be better than a coin", "more pairs"),
    ({"longer_rewarded": 0.9, "length_correlation": 0.8}, "length moves the reward", "response_length"),
    ({"cut_effect": -8.0}, "a reward says whether a text is finished", "max_new_tokens"),
    ({"cut_effect": 2.0}, "a reward says whether a text is finished", "pooling"),
    ({"error_auroc": 0.48, "error_auroc_interval": Interval(0.4, 0.57)}, "σ does not tell", "MeanReward"),
    ({"sigma_constant_share": 0.96}, "members differ by constants", "reward calibrate"),
]


def report(margins, responses=None):
    margins = torch.as_tensor(margins)
    return PreferenceReport(
        torch.arange(len(margins)), ensemble_estimate(margins), torch.ones(len(margins), 2), 0, responses
    )


def test_findings_hand_worked():
    # Mean margins 2, -1, 3, -2: two of four right. Longer by 3, 2, -1 and 0 tokens: of the three pairs of unequal
    # length the reward prefers the longer response in the first alone, people in the first two.
    # Correlation of (2, -1, 3, -2) with (3, 2, -1, 0): (6 - 2 - 3) / √(18 · 14).
    members = torch.tensor([[1.0, 3.0], [-2.0, 0.0], [3.0, 3.0], [-1.0, -3.0]])
    lengths = torch.tensor([[5, 2], [4, 2], [3, 4], [6, 6]])
    # Whole responses 0 and 2, so of a standard deviation of √2; cut in half both lose 1.
    found = find(report(members), lengths, (torch.tensor([0.0, 2.0]), torch.tensor([-1.0, 1.0])))
    assert (found.num_pairs, found.num_errors, found.accuracy) == (4, 2, 0.5)
    assert found.longer_rewarded == pytest.approx(1 / 3)
    assert found.longer_chosen == pytest.approx(2 / 3)
    assert found.length_correlation == pytest.approx(1 / math.sqrt(252))
    assert found.cut_effect == pytest.approx(-1 / math.sqrt(2))
    # σ² 2, 2, 0, 2: a wrong pair's is larger than one right pair's, and equal to the other's.
    assert found.error_auroc == pytest.approx(0.75)
    assert found.error_auroc_interval == auroc_interval(0.75, 2, 2)
    assert found.accuracy_interval == share_interval(0.5, 4)


def test_members_that_differ_by_constants_are_found_where_they_are_comparable():
    responses = torch.randn(6, 2, 1) + torch.tensor([0.0, 5.0, 2.5])
    known = report(torch.randn(6, 2), responses)
    assert find(known).sigma_constant_share == pytest.approx(1)
    assert math.isnan(find(known, calibrated=False).sigma_constant_share)


def test_what_is_not_known_is_not_said():
    found = find(report(torch.ones(3, 1)))
    text = " ".join(sentences(found))
    assert "3 held-out pairs" in text
    assert "too few" in text
    assert "nan" not in text
    assert "Length" not in text
    assert "Ending" not in text


def test_a_good_ensemble_gets_no_warning():
    text = " ".join(sentences(GOOD))
    assert "WARNING" not in text
    for seen in ("70% of 200", "63% to 76%", "in 55% of pairs", "-0.20", "0.62", "10%"):
        assert seen in text


@pytest.mark.parametrize(("bad", "what", "remedy"), BAD)
def test_each_bad_answer_is_a_warning_with_what_to_try(bad, what, remedy):
    lines = sentences(dataclasses.replace(GOOD, **bad))
    (warned,) = [i for i, line in enumerate(lines) if line.startswith("WARNING")]
    assert what in lines[warned]
    assert remedy in lines[warned + 1]


def test_few_errors_say_nothing_about_sigma():
    for errors in (9, 191):
        text = " ".join(sentences(dataclasses.replace(GOOD, num_errors=errors, error_auroc=0.2)))
        assert "too few to say" in text
        assert "WARNING" not in text


def test_intervals_against_known_values():
    # Wilson's interval of 8 of 10 as published: 0.490 to 0.943.
    assert share_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    # Hanley and McNeil, worked by hand: A = 0.8, P = N = 10 give Q₁ = 0.6667, Q₂ = 0.7111, SE² = 0.010711.
    half = 1.959964 * math.sqrt((0.16 + 9 * (2 / 3 - 0.64) + 9 * (1.28 / 1.8 - 0.64)) / 100)
    assert auroc_interval(0.8, 10, 10) == pytest.approx((0.8 - half, min(1, 0.8 + half)))
    for bad in ((0.5, 0), (1.5, 3)):
        with pytest.raises(ValueError, match="expected a share in"):
            share_interval(*bad)
    with pytest.raises(ValueError, match="expected an area in"):
        auroc_interval(0.5, 0, 3)


@pytest.mark.parametrize("area", [0.5, 0.8])
def test_the_auroc_interval_covers(area):
    # Normal scores with the mean of positives apart: of 400 draws about 95% lie within.
    from lit_vapo.functional import auroc

    generator = torch.Generator().manual_seed(0)
    shift = 2**0.5 * torch.special.ndtri(torch.tensor(area))
    known = torch.arange(80) < 30
    inside = 0
    for _ in range(400):
        scores = torch.randn(80, generator=generator) + shift * known
        low, high = auroc_interval(float(auroc(scores, known)), 30, 50)
        inside += low <= area <= high
    assert 0.92 < inside / 400 < 0.98


@pytest.mark.parametrize(("rewarded", "wanted"), [(0.9, "shorter"), (0.1, "longer")])
def test_advice_on_length_asks_for_the_side_that_is_rewarded_too_little(rewarded, wanted):
    findings = dataclasses.replace(GOOD, longer_rewarded=rewarded, longer_chosen=0.5)
    assert f"more pairs whose {wanted} response was chosen" in " ".join(sentences(findings))
