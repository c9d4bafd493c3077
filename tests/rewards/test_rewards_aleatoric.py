"""Heads that tell noise of labels from ignorance: planted noise, anchor, estimate, tables."""

import csv

import pytest
import torch

from lit_vapo.evaluation.preference_files import evaluation, write_report
from lit_vapo.evaluation.preference_tables import subset_table
from lit_vapo.functional import noise_variance, noisy_log_odds, spearman
from lit_vapo.metrics import PreferenceMetrics
from lit_vapo.rewards.members.aleatoric import AleatoricEnsemble
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.types import FeaturePairs, PairLabels

HIDDEN, MEMBERS = 4, 6


def rows(count, seed):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


REWARD, NOISE = rows(2, 1) * torch.tensor([[2.5], [0.7]])


def planted(count, votes):
    """Pairs that some people judged each, whose noise differs between responses; the share of votes is the label."""
    a, b = rows(count, 2), rows(count, 3)
    probability = noisy_log_odds(a @ REWARD, b @ REWARD, a @ NOISE, b @ NOISE).sigmoid()
    draws = torch.rand(count, votes, generator=torch.Generator().manual_seed(4))
    share = (draws < probability[:, None]).float().mean(1)
    swap = share < 0.5
    labels = PairLabels(torch.zeros(count), (share - 0.5).abs() + 0.5, torch.ones(count), torch.arange(count))
    return FeaturePairs(torch.where(swap[:, None], b, a), torch.where(swap[:, None], a, b), labels)


def trained(pairs, kind=AleatoricEnsemble, steps=200, **options):
    head = kind(MEMBERS, **options)
    head.build(HIDDEN)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        head.loss(*pairs).backward()
        optimizer.step()
    head.requires_grad_(False).calibrate(rows(400, 5))
    return head


@pytest.fixture(scope="module")
def judged():
    return planted(400, 20)


@pytest.fixture(scope="module")
def head(judged):
    return trained(judged, moderated=False)


def test_planted_noise_is_found_in_units_of_the_reference(head):
    x = rows(400, 5)
    estimate = head(x)
    true = noise_variance(x @ NOISE) / (x @ REWARD).var()
    assert spearman(estimate.mean, x @ REWARD) > 0.98
    assert spearman(estimate.aleatoric, true) > 0.95
    assert (estimate.aleatoric / true).log().median().abs() < 0.5


def test_more_pairs_lower_ignorance_and_not_noise(head):
    x = rows(400, 5)
    few, many = trained(planted(60, 20))(x), trained(planted(2000, 20))(x)
    assert many.variance.mean() < 0.2 * few.variance.mean()
    assert many.aleatoric.median() == pytest.approx(head(x).aleatoric.median().item(), rel=0.3)


def test_the_anchor_keeps_the_mean_of_the_log_noise_at_zero(judged):
    # Along the open unit the likelihood does not change, so at its best the penalty does not: Σ w·s = 0.
    head = trained(judged, steps=800, anchor=0.03, bootstrap=False)
    s = head.log_noise(torch.cat(judged[:2]))
    assert s.mean(0).abs().max() < 0.05
    assert s.std() > 0.15


def test_the_loss_is_the_likelihood_of_soft_labels_by_hand():
    # One member, one feature: μ = 2 and 0, s = log(π/2) of both (τ² = 2), z = 1. With three of four votes:
    # −0.75·log 0.841345 − 0.25·log 0.158655 = 0.129566 + 0.460256; anchor: 0.1·2·log(π/2)² = 0.040786.
    head = AleatoricEnsemble(1, anchor=0.1, bootstrap=False)
    head.build(1)
    with torch.no_grad():
        head.weight.fill_(2.0)
        head.noise_bias.fill_(0.4515827)
    labels = PairLabels(torch.zeros(1), torch.tensor([0.75]), torch.ones(1), torch.zeros(1, dtype=torch.long))
    loss = head.loss(torch.ones(1, 1), torch.zeros(1, 1), labels)
    assert loss.item() == pytest.approx(0.129566 + 0.460256 + 0.040786, abs=1e-4)


@pytest.mark.parametrize("variance", ["epistemic", "aleatoric", "total"])
def test_objectives_get_the_variance_that_was_chosen(head, judged, variance):
    x = rows(50, 6)
    plain = head(x)
    other = AleatoricEnsemble(MEMBERS, variance=variance, moderated=False)
    other.build(HIDDEN)
    other.load_state_dict(head.state_dict())
    other.calibrate(rows(400, 5))
    found = other(x)
    expected = {
        "epistemic": plain.members.var(1),
        "aleatoric": plain.aleatoric,
        "total": plain.members.var(1) + plain.aleatoric,
    }[variance]
    torch.testing.assert_close(found.variance, expected)
    torch.testing.assert_close(found.aleatoric, plain.aleatoric)
    torch.testing.assert_close(other(rows(400, 5)).variance.mean(), other.reference_variance)


def test_noise_far_from_the_pairs_is_finite(head):
    estimate = head(1e6 * rows(8, 7))
    assert torch.isfinite(estimate.aleatoric).all()
    assert torch.isfinite(head.margin(1e6 * rows(8, 7), rows(8, 8)).mean).all()


def reported(head, pairs):
    metric = PreferenceMetrics()
    metric.update(head.margin(*pairs[:2]), head(pairs.chosen), head(pairs.rejected), pairs.labels)
    return metric.compute()


def test_tables_tell_noise_from_ignorance(head, judged, tmp_path):
    report = reported(head, judged)
    kept = judged.labels.probability != 0.5
    expected = torch.stack([head(x).aleatoric.sqrt() for x in judged[:2]], 1)[kept]
    torch.testing.assert_close(report.response_noise, expected)
    record = evaluation(report)
    assert record["uncertainty"]["response_noise"] == pytest.approx(expected.mean().item())
    assert record["uncertainty"]["response_sigma"] == pytest.approx(report.response_sigma.mean().item())
    half = torch.arange(report.num_pairs) % 2 == 0
    table = subset_table(report, ["even" if x else "odd" for x in half])
    assert table[0]["response_noise"] == pytest.approx(expected[half].mean().item())
    write_report(tmp_path, report, record)
    with (tmp_path / "pairs.csv").open() as file:
        pairs = list(csv.DictReader(file))
    for side, name in enumerate(("chosen_noise", "rejected_noise")):
        assert [float(row[name]) for row in pairs] == pytest.approx(expected[:, side].tolist(), rel=1e-5)


def test_tables_of_other_estimators_have_no_noise(judged, tmp_path):
    report = reported(trained(judged, HeadEnsemble, steps=2), judged)
    write_report(tmp_path, report, evaluation(report))
    for name in ("evaluation.json", "pairs.csv"):
        assert "noise" not in (tmp_path / name).read_text()
