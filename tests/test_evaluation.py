"""Evaluation of ensembles: what is collected, the figures, the tables and the files."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from sklearn.metrics import roc_auc_score

from lit_vapo.evaluation.preference_files import evaluation, write_report
from lit_vapo.evaluation.preference_report import PreferenceReport
from lit_vapo.evaluation.preference_tables import ood_auroc, subset_table, temperature_report
from lit_vapo.functional import ensemble_estimate
from lit_vapo.metrics import PreferenceMetrics
from lit_vapo.types import PairLabels, RewardEstimate


def labels(ids, probability=1.0):
    ids = torch.as_tensor(ids)
    probability = torch.as_tensor(probability).expand(len(ids))
    return PairLabels(torch.zeros(len(ids)), probability, torch.ones(len(ids)), ids)


def response(members, variance):
    """An estimate of normalised rewards; σ² is what the test says."""
    return ensemble_estimate(members)._replace(variance=torch.as_tensor(variance).expand(len(members)))


def collect(*batches):
    """Report on batches of (members, labels); σ² of the responses is 1 and 4 times the example id."""
    metrics = PreferenceMetrics()
    for members, known in batches:
        ids = known.example_ids.float()
        metrics.update(ensemble_estimate(members), response(members, ids), response(-members, 4 * ids), known)
    return metrics.compute()


def random_report(seed, size=300, members=4, scale=1.0, sigma=1.0):
    """A report on pairs whose members scatter by as much as the mean errs."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(size, 1, generator=generator) * 2
    margins = 1 + spread * (torch.randn(size, 1, generator=generator) + torch.randn(size, members, generator=generator))
    variance = sigma * torch.rand(size, 2, generator=generator)
    return PreferenceReport(torch.arange(size), ensemble_estimate(scale * margins), variance)


def test_report_hand_worked():
    # Members (2, 0), (-1, 2), (-1, 1), (-3, 1): mean margins 1, 0.5, 0, -1; σ² 2, 4.5, 2, 8.
    members = torch.tensor([[2.0, 0.0], [-1.0, 2.0], [-1.0, 1.0], [-3.0, 1.0]])
    report = collect((members[:2], labels([1, 2])), (members[2:], labels([3, 4])))
    assert report.num_pairs == 4
    assert report.accuracy.tolist() == pytest.approx([1 / 4, 3.5 / 4, 2.5 / 4])
    columns = ((2, -1, -1, -3), (0, 2, 1, 1), (1, 0.5, 0, -1))
    nll = [sum(math.log1p(math.exp(-m)) for m in ms) / 4 for ms in columns]
    assert report.nll.tolist() == pytest.approx(nll)
    brier = [sum((1 - 1 / (1 + math.exp(-m))) ** 2 for m in ms) / 4 for ms in columns]
    assert report.brier.tolist() == pytest.approx(brier)
    torch.testing.assert_close(report.margin_sigma, torch.tensor([2.0, 4.5, 2.0, 8.0]).sqrt())
    torch.testing.assert_close(report.response_sigma, torch.tensor([[i**0.5, 2 * i**0.5] for i in (1, 2, 3, 4)]))
    # 2 and 0 differ too: one member prefers, one does not.
    assert report.disagreement.item() == 1
    assert report.error.tolist() == [0, 0, 0.5, 1]
    # The wrong pair has the largest σ of all.
    assert report.error_auroc.item() == 1
    # σ ranks 1.5, 3, 1.5, 4 against error ranks 1.5, 1.5, 3, 4.
    x, y = np.array([-1, 0.5, -1, 1.5]), np.array([-1, -1, 0.5, 1.5])
    assert report.error_spearman.item() == pytest.approx(x @ y / (x @ x))
    # The two of σ² 2 share the mean error 1/4: risks 1/4, 1/4, 1/6, 3/8.
    torch.testing.assert_close(report.risk_coverage.risk, torch.tensor([1 / 4, 1 / 4, 1 / 6, 3 / 8]))


def test_report_against_sklearn_and_scipy():
    report = random_report(0)
    sigma = report.margins[:, :-1].numpy().std(axis=1, ddof=1)
    wrong = report.margins[:, :-1].numpy().mean(axis=1) < 0
    assert 0.1 < wrong.mean() < 0.5
    assert report.error_auroc.item() == pytest.approx(roc_auc_score(wrong, sigma), rel=1e-5)
    assert report.error_spearman.item() == pytest.approx(stats.spearmanr(sigma, wrong).statistic, rel=1e-5)
    errors = wrong[np.argsort(sigma)]
    aurc = np.mean([errors[: k + 1].mean() for k in range(len(errors))])
    assert report.risk_coverage.area.item() == pytest.approx(aurc, rel=1e-5)
    assert report.error_auroc > 0.55


def test_summary_has_the_mean_and_the_members_on_average():
    report = random_report(1)
    summary = report.summary()
    assert summary["accuracy"] == report.accuracy[-1].item()
    assert summary["member_ece"] == pytest.approx(sum(report.ece[:4].tolist()) / 4)
    assert summary["margin_sigma"] == pytest.approx(report.margin_sigma.mean().item())
    assert summary["aurc"] == report.risk_coverage.area.item()
    assert all(type(value) is float for value in summary.values())


def test_ties_are_counted_and_left_out():
    members = torch.randn(6, 3)
    known = labels(range(6), torch.tensor([1.0, 0.5, 0.7, 0.5, 1.0, 1.0]))
    report = collect((members, known))
    assert (report.num_pairs, report.num_ties) == (4, 2)
    assert report.example_ids.tolist() == [0, 2, 4, 5]
    without = collect((members[[0, 2, 4, 5]], labels([0, 2, 4, 5])))
    assert report.summary() == without.summary()


def test_rows_repeated_by_a_sampler_count_once_in_the_order_of_ids():
    members = torch.randn(5, 3)
    ids = torch.tensor([7, -3, 2, 9, 4])
    once = collect((members, labels(ids)))
    assert once.example_ids.tolist() == [-3, 2, 4, 7, 9]
    order = torch.tensor([3, 0, 4, 2, 1])
    repeated = collect((members[order], labels(ids[order])), (members[:2] + 1, labels(ids[:2])))
    assert repeated.num_pairs == 5
    assert torch.equal(repeated.margins, once.margins)
    assert torch.equal(repeated.response_sigma, once.response_sigma)
    # A repeated tie is one tie.
    tie = (members[:1], labels([1], 0.5))
    assert collect(tie, tie, (members, labels(ids))).num_ties == 1


def test_processes_are_joined():
    # Two processes with rows 0 to 4 and 4 to 7: row 4 was repeated to even them out.
    members = torch.randn(8, 3)
    known = labels(range(8))
    parts = [PreferenceMetrics(), PreferenceMetrics()]
    for metrics, rows in zip(parts, (slice(0, 5), slice(4, 8)), strict=True):
        for i in range(8)[rows]:
            one = members[[i]]
            metrics.update(ensemble_estimate(one), response(one, 1.0), response(one, 1.0), labels([i]))
    states = {torch.int64: torch.cat(parts[1].example_ids), torch.float32: torch.cat(parts[1].columns)}
    parts[0].dist_sync_fn = lambda own, group: [own, states[own.dtype]]
    parts[0].distributed_available_fn = lambda: True
    report = parts[0].compute()
    assert torch.equal(report.margins, collect((members, known)).margins)
    parts[0].reset()
    assert parts[0].columns == []
    assert parts[0].example_ids == []


def test_one_pair_and_one_member_keep_their_shapes():
    report = collect((torch.tensor([[2.0]]), labels([5])))
    assert report.accuracy.tolist() == [1, 1]
    assert report.example_ids.tolist() == [5]
    assert report.response_sigma.shape == (1, 2)


def test_one_member_knows_nothing_of_its_errors():
    report = collect((torch.tensor([[1.0], [-1.0], [2.0]]), labels([1, 2, 3])))
    assert report.error_auroc.item() == 0.5
    assert math.isnan(report.error_spearman)
    assert report.disagreement.item() == 0
    assert report.risk_coverage.risk.tolist() == pytest.approx([1 / 3] * 3)
    assert math.isnan(report.select(torch.tensor([0, 2])).error_auroc)


def test_an_estimator_without_members_has_figures_of_the_mean_only():
    metrics = PreferenceMetrics()
    estimate = RewardEstimate(torch.tensor([1.0, -1.0]), torch.tensor([0.1, 0.5]), None)
    metrics.update(estimate, estimate, estimate, labels([1, 2]))
    report = metrics.compute()
    assert report.margin.members is None
    assert report.accuracy.tolist() == [0.5]
    assert report.error_auroc.item() == 1
    assert math.isnan(report.disagreement)
    summary = report.summary()
    assert not [name for name in summary if name.startswith("member_") or name == "disagreement"]


def test_nothing_but_ties_is_nan_and_not_an_error():
    report = collect((torch.randn(3, 2), labels([1, 2, 3], 0.5)))
    assert (report.num_pairs, report.num_ties) == (0, 3)
    assert all(math.isnan(value) for value in report.summary().values())
    assert report.accuracy.shape == (3,)


def test_undecided_pairs_are_left_out_of_the_auroc():
    # Mean margins 1, -1 and 0 with σ 1, 2 and 3.
    estimate = RewardEstimate(torch.tensor([1.0, -1.0, 0.0]), torch.tensor([1.0, 4.0, 9.0]), None)
    report = PreferenceReport(torch.arange(3), estimate, torch.zeros(3, 2))
    assert report.error_auroc.item() == 1
    assert math.isnan(report.select(torch.tensor([2])).error_auroc)


def test_shapes_that_do_not_fit_are_refused():
    metrics = PreferenceMetrics()
    two, one = ensemble_estimate(torch.zeros(2, 3)), ensemble_estimate(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"expected chosen of shape \(2,\), as margin, got \(1,\)"):
        metrics.update(two, one, two, labels([1, 2]))
    with pytest.raises(ValueError, match=r"expected example_ids of shape \(2,\), as margin, got \(1,\)"):
        metrics.update(two, two, two, labels([1]))


def test_the_responses_rewards_are_kept_by_member_and_mean():
    members = torch.tensor([[2.0, 0.0], [-1.0, 2.0], [-1.0, 1.0]])
    report = collect((members[1:], labels([2, 3])), (members[:1], labels([1])))
    chosen = torch.cat([members, members.mean(1, keepdim=True)], 1)
    torch.testing.assert_close(report.responses, torch.stack([chosen, -chosen], 1))
    # Members' means over the six responses are 0, so nothing of their variance is a constant.
    assert report.constant_share.item() == pytest.approx(0)
    # The second of two members that agree on all, but for a constant of 3.
    apart = torch.randn(40, 1) + torch.tensor([0.0, 3.0])
    metrics = PreferenceMetrics()
    estimate = ensemble_estimate(apart)
    metrics.update(estimate, estimate, estimate, labels(range(40)))
    report = metrics.compute()
    assert report.constant_share.item() == pytest.approx(1)
    assert report.select(torch.tensor([0, 5])).summary()["sigma_constant_share"] == pytest.approx(1)


def test_subsets_are_reports_of_their_own():
    report = random_report(2, size=90)
    names = ["chat", "code", "safety"] * 30
    table = subset_table(report, names)
    assert [row["subset"] for row in table] == ["chat", "code", "safety", "all"]
    assert [row["num_pairs"] for row in table] == [30, 30, 30, 90]
    for i, row in enumerate(table[:3]):
        members = report.margin.members[i::3]
        alone = PreferenceReport(report.example_ids[i::3], ensemble_estimate(members), torch.zeros(30, 2))
        assert row["accuracy"] == pytest.approx(alone.accuracy[-1].item())
        assert row["nll"] == pytest.approx(alone.nll[-1].item())
        assert row["ece"] == pytest.approx(alone.ece[-1].item())
        assert row["sigma"] == pytest.approx(alone.margin_sigma.mean().item())
        assert row["auroc"] == pytest.approx(alone.error_auroc.item())
    for name in ("accuracy", "nll", "sigma"):
        assert sum(row[name] for row in table[:3]) / 3 == pytest.approx(table[3][name])
    with pytest.raises(ValueError, match="expected names of 90 pairs, got 2"):
        subset_table(report, names[:2])


def test_selecting_keeps_every_column():
    report = random_report(3, size=10)
    part = report.select(torch.tensor([1, 4]))
    torch.testing.assert_close(part.margins, report.margins[[1, 4]])
    torch.testing.assert_close(part.response_sigma, report.response_sigma[[1, 4]])
    torch.testing.assert_close(part.margin_sigma, report.margin_sigma[[1, 4]])


def test_temperature_is_fitted_on_validation_and_judged_on_test():
    validation, test = random_report(4, scale=8.0), random_report(5, scale=8.0)
    found = temperature_report(validation, test)

    def loss(t):
        return np.logaddexp(0, -validation.margin.mean.numpy() / t).mean()

    best = optimize.minimize_scalar(loss, bounds=(0.01, 100), options={"xatol": 1e-8}).x
    assert best > 2
    assert found["temperature"] == pytest.approx(best, rel=1e-4)
    scaled = RewardEstimate(test.margin.mean / best, test.margin.variance, None)
    after = PreferenceReport(test.example_ids, scaled, torch.zeros(300, 2))
    for name in ("nll", "ece", "brier"):
        assert found[name] == pytest.approx(getattr(test, name)[-1].item())
        assert found[f"{name}_calibrated"] == pytest.approx(getattr(after, name)[-1].item(), rel=1e-4)
    assert found["nll_calibrated"] < found["nll"]
    with pytest.raises(ValueError, match="expected at least one pair that is not a tie in validation, got none"):
        temperature_report(validation.select(torch.zeros(300, dtype=torch.bool)), test)


def test_ood_auroc_against_sklearn():
    inside, outside = random_report(6, size=50), random_report(7, size=70, sigma=3.0)
    sigma = torch.cat([inside.response_sigma.flatten(), outside.response_sigma.flatten()])
    expected = roc_auc_score([0] * 100 + [1] * 140, sigma)
    assert ood_auroc(inside, outside).item() == pytest.approx(expected, rel=1e-6)
    assert expected > 0.6
    assert ood_auroc(inside, inside).item() == 0.5
    nobody = inside.select(torch.zeros(50, dtype=torch.bool))
    assert math.isnan(ood_auroc(inside, nobody))
    assert math.isnan(ood_auroc(nobody, nobody))


def refuse(token):
    raise AssertionError(f"{token} is not JSON")


def test_files_hold_what_the_report_holds(tmp_path):
    report = random_report(8, size=40)
    found = {"temperature": 1.5, "nll": 0.5}
    subsets = subset_table(report, ["a", "b"] * 20)
    paths = write_report(tmp_path / "new", report, evaluation(report, temperature=found, ood=0.7, subsets=subsets))
    assert [path.name for path in paths] == ["evaluation.json", "evaluation.csv", "pairs.csv"]
    record = json.loads(paths[0].read_text(), parse_constant=refuse)
    names = ["mean", "members", "num_pairs", "num_ties", "uncertainty", "temperature", "ood_auroc", "subsets"]
    assert list(record) == names
    assert record["mean"]["brier"] == pytest.approx(report.brier[-1].item())
    assert [row["nll"] for row in record["members"]] == pytest.approx(report.nll[:-1].tolist())
    assert record["uncertainty"]["best_aurc"] == pytest.approx(report.risk_coverage.best_area.item())
    assert (record["temperature"], record["ood_auroc"], record["subsets"]) == (found, 0.7, subsets)

    rows = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert [row["member"] for row in rows] == ["0", "1", "2", "3", "mean"]
    assert [float(row["ece"]) for row in rows] == pytest.approx(report.ece.tolist(), rel=1e-6)

    pairs = list(csv.DictReader(paths[2].read_text().splitlines()))
    assert [int(row["example_id"]) for row in pairs] == report.example_ids.tolist()
    assert [float(row["margin_sigma"]) for row in pairs] == pytest.approx(report.margin_sigma.tolist(), rel=1e-6)
    assert [float(row["rejected_sigma"]) for row in pairs] == pytest.approx(report.response_sigma[:, 1].tolist())
    assert [float(row["margin_member_2"]) for row in pairs] == pytest.approx(report.margins[:, 2].tolist(), rel=1e-6)


def test_files_are_the_same_bytes_again(tmp_path):
    def written():
        report = random_report(9)
        return [path.read_bytes() for path in write_report(tmp_path, report, evaluation(report, ood=0.5))]

    assert written() == written()


def test_what_is_not_defined_is_null(tmp_path):
    estimate = RewardEstimate(torch.tensor([1.0, 2.0]), torch.zeros(2), None)
    report = PreferenceReport(torch.tensor([2**62, 2**62 + 1]), estimate, torch.zeros(2, 2), num_ties=3)
    paths = write_report(tmp_path, report, evaluation(report, subsets=subset_table(report, ["a", "b"])))
    record = json.loads(paths[0].read_text(), parse_constant=refuse)
    assert record["members"] == []
    assert record["num_ties"] == 3
    assert record["uncertainty"]["error_auroc"] is None
    assert record["uncertainty"]["disagreement"] is None
    assert record["subsets"][0]["auroc"] is None
    assert paths[2].read_text().splitlines()[2] == f"{2**62 + 1},2,0,0,0"
