"""Evaluations of policies: what is collected, the figures and the files."""

import csv
import itertools
import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import WandbLogger

from lit_vapo.callbacks.samples import SampleTable
from lit_vapo.evaluation.policy_files import (
    evaluation_row,
    policy_evaluation,
    read_evaluations,
    write_evaluations,
)
from lit_vapo.evaluation.policy_report import PolicyReport, compare
from lit_vapo.metrics import ResponseMetrics


def record(prompt, number, reward, gold, **other):
    """The record of a response that says its prompt and number."""
    return {
        "policy": "policy", "prompt_id": prompt, "response_number": number, "prompt": f"p{prompt}",
        "response": f"says {prompt} {number}\u2028", "stopped": True, "length": 2, "reward": reward, "sigma": 0.5,
        "members": [reward - 1, reward + 1], "objective_reward": reward, "kl": 0.0, "kl_weight": 1.0, "entropy": 1.0,
        "gold": gold, **other,
    }  # fmt: skip


def records(prompts=4, responses=3, seed=0, **other):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(prompts, responses, 2, generator=generator, dtype=torch.float64).tolist()
    return [record(i, j, *scores[i][j], **other) for i in range(prompts) for j in range(responses)]


def collected(*batches):
    metrics = ResponseMetrics()
    for batch in batches:
        metrics.update(batch)
    return metrics.compute()


def test_records_come_back_as_they_were():
    rows = records()
    rows[0]["response"] = "é\u2028\x85\n\ud800 \U0001f600"
    assert collected(rows[:5], rows[5:]) == rows


def test_rows_repeated_by_a_sampler_count_once():
    rows = records()
    again = [{**row, "reward": 9.0} for row in rows[:3]]
    assert collected(rows, again) == rows


def test_processes_are_joined():
    # Two processes with prompts 0, 2 and 1, 0: prompt 0 was repeated to even them out.
    rows = records(3, 2)
    parts = [ResponseMetrics(), ResponseMetrics()]
    for metrics, prompts in zip(parts, ((0, 2), (1, 0)), strict=True):
        for i in prompts:
            metrics.update(rows[2 * i : 2 * i + 2])
    other = torch.cat(parts[1].text)
    parts[0].dist_sync_fn = lambda own, group: [own, other]
    parts[0].distributed_available_fn = lambda: True
    found = parts[0].compute()
    assert [r["prompt_id"] for r in found] == [0, 0, 2, 2, 1, 1]
    assert sorted(found, key=lambda r: r["prompt_id"]) == rows
    # What a process had is what it has: the reference's answers stay from one evaluation to the next.
    assert len(parts[0].text) == 2
    parts[0].reset()
    assert parts[0].text == []


def test_figures_are_over_all_rows_and_not_over_batches():
    # Two rows of one and one of four tokens: the entropy is a mean over tokens, everything else over rows.
    rows = [record(0, 0, 1.0, 0.0, length=1, entropy=3.0, kl=1.0, kl_weight=2.0),
            record(1, 0, 4.0, 1.0, length=1, entropy=3.0, kl=-1.0),
            record(2, 0, 1.0, 0.0, length=4, entropy=0.5, stopped=False)]  # fmt: skip
    found = PolicyReport(rows).summary()
    k3 = [math.exp(-1), math.exp(1) - 2, 0]
    expected = {
        "reward_mean": 2, "reward_std": math.sqrt(2), "objective_reward": 2, "ensemble_sigma": 0.5, "kl_k1": 0,
        "kl_k3": sum(k3) / 3, "kl_weighted_k3": (2 * k3[0] + k3[1]) / 3, "kl_weight_mean": 4 / 3, "kl_weight_max": 2,
        "entropy": 8 / 6, "response_length": 2, "response_length_std": math.sqrt(2), "eos_rate": 2 / 3, "gold": 1 / 3,
        "gold_std": math.sqrt(2) / 3, "reward_member_0": 1, "reward_member_1": 3, "distinct_pairs": 4 / 6,
        "repeated_words": 1 / 6, "distinct_responses": 1,
    }  # fmt: skip
    rows[1]["response"], rows[2]["response"] = "says so so", "says so 2 0"
    found = PolicyReport(rows).summary()
    # "says 0", "0 0", "says so", "so so", "says so", "so 2", "2 0".
    expected |= {"distinct_pairs": 6 / 7, "repeated_words": 2 / 7}
    assert found == pytest.approx(expected)


def test_of_many_members_the_first_are_shown_and_all_are_in_the_files(tmp_path, capsys):
    rows = [record(i, 0, 1.0, 0.0) | {"members": [float(k) for k in range(20)]} for i in range(2)]
    shown = [name for name in PolicyReport(rows).summary() if name.startswith("reward_member_")]
    assert shown == [f"reward_member_{k}" for k in range(16)]
    tables = {}

    class Board(WandbLogger):
        def __init__(self):
            pass

        def log_table(self, key, columns, data):
            tables[key] = dict(zip(columns, data[0], strict=True))

    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path, global_step=3, loggers=[Board()])
    SampleTable().on_predict_end(trainer, SimpleNamespace(samples=rows))
    assert capsys.readouterr().out == f"2 responses: {tmp_path}/samples_predict.jsonl\n"
    assert [name for name in tables["predict/samples"] if name.startswith("member_")] == [
        f"member_{k}" for k in range(16)
    ]
    (first, _) = map(json.loads, (tmp_path / "samples_predict.jsonl").read_text().splitlines())
    assert len(first["members"]) == 20


def test_best_of_n_takes_what_the_ensemble_prefers():
    rows = records(5, 4)
    report = PolicyReport(rows)
    for name in ("reward", "gold"):
        for n in range(1, 5):
            best = [
                max((rows[4 * i + j] for j in subset), key=lambda r: r["reward"])[name]
                for i in range(5)
                for subset in itertools.combinations(range(4), n)
            ]
            assert report.best_of_n[name][n - 1].item() == pytest.approx(statistics.mean(best))
    summary = report.summary()
    assert summary["best_of_n_gold"] == report.best_of_n["gold"][-1].item()
    assert summary["best_of_n_reward"] == report.best_of_n["reward"][-1].item()
    assert not [name for name in PolicyReport(records(5, 1)).summary() if "best" in name]


def test_comparison_against_loops():
    ours, theirs = records(4, 3, seed=1), records(6, 2, seed=2)
    # The reference answered more prompts, and in another order.
    found = compare(PolicyReport(ours), PolicyReport(theirs[6:] + theirs[:6]))
    for name, key in (("gold", "win_rate"), ("reward", "reward_win_rate")):
        pairs = [[[r[name] for r in rows if r["prompt_id"] == i] for rows in (ours, theirs)] for i in range(4)]
        wins = [float(x > y) for a, b in pairs for x in a for y in b]
        gains = [statistics.mean(a) - statistics.mean(b) for a, b in pairs]
        assert found[key] == pytest.approx(statistics.mean(wins))
        assert found[f"{name}_gain"] == pytest.approx(statistics.mean(gains))
        assert found[f"{name}_gain_se"] == pytest.approx(statistics.stdev(gains) / 2)


def test_without_a_judge_and_without_members():
    rows = [{**row, "members": []} for row in records(3, 2)]
    for row in rows:
        row.pop("gold")
    report = PolicyReport(rows)
    assert not [name for name in report.summary() if "gold" in name or "member" in name]
    assert set(compare(report, report)) == {"reward_win_rate", "reward_gain", "reward_gain_se"}
    assert compare(report, report)["reward_win_rate"] == 0.5


def test_reports_that_cannot_be_are_refused():
    rows = records(3, 2)
    with pytest.raises(ValueError, match="expected at least one response, got none"):
        PolicyReport([])
    for bad in (rows[:-1], [rows[0], rows[2], rows[1], rows[3]]):
        with pytest.raises(
            ValueError, match=r"expected equally many responses to each prompt, side by side, got \d to"
        ):
            PolicyReport(bad)
    with pytest.raises(ValueError, match="expected responses to the same prompts, got none to prompt 2"):
        compare(PolicyReport(rows), PolicyReport(rows[:4]))


def test_a_test_as_a_record():
    policy, reference = PolicyReport(records(4, 3, seed=1)), PolicyReport(records(4, 3, seed=2))
    found = policy_evaluation(policy, reference)
    assert list(found) == ["num_prompts", "num_responses", "policy", "reference", "comparison", "best_of_n"]
    assert (found["num_prompts"], found["num_responses"]) == (4, 3)
    assert found["reference"] == reference.summary()
    assert found["comparison"] == compare(policy, reference)
    table = found["best_of_n"]["policy"]
    assert table["n"] == [1, 2, 3]
    assert table["kl_bound"] == pytest.approx([0, math.log(2) - 1 / 2, math.log(3) - 2 / 3])
    assert table["gold"] == policy.best_of_n["gold"].tolist()
    json.dumps(found, allow_nan=False)
    assert "best_of_n" not in policy_evaluation(PolicyReport(records(4, 1)), PolicyReport(records(4, 1)))


def test_the_course_of_a_run_survives_its_file(tmp_path):
    path = tmp_path / "new" / "evaluations.csv"
    assert read_evaluations(path) == []
    rows = [
        evaluation_row("reference", 0, 0, {"gold": 0.5, "kl_k1": 0.0}),
        evaluation_row("policy", 9, 36, {"gold": 0.1 + 0.2, "kl_k1": 1e-9, "win_rate": math.nan, "gold_gain": 0.25}),
    ]
    write_evaluations(path, rows)
    found = read_evaluations(path)
    assert [(r["policy"], r["iteration"], r["step"]) for r in found] == [("reference", 0, 0), ("policy", 9, 36)]
    assert found[1]["gold"] == pytest.approx(0.3, rel=1e-6)
    assert math.isnan(found[0]["win_rate"])
    assert math.isnan(found[1]["win_rate"])
    before = path.read_bytes()
    write_evaluations(path, found)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["evaluations.csv"]
    assert list(csv.reader(before.decode().splitlines()))[1] == ["reference", "0", "0", "0.5", "0", "", ""]
