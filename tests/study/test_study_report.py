"""What a study says: points, comparisons, verdicts, pages, and the command."""

import json
import pickle
import re

import numpy as np
import pytest
from helpers import CONFIGS
from jsonargparse import ArgumentParser
from study_experiments import Toy

from lit_vapo.cli import main
from lit_vapo.study.execution import Study, run
from lit_vapo.study.experiment import Analysis, Record, Repetition, seed_of
from lit_vapo.study.report import report
from lit_vapo.study.statistics import Interval
from lit_vapo.study.summary import FAILS, HOLDS, OPEN, compare, formulas, further, outcomes, sentences, verdict


def record(gain, method="m", repetition=0, setting="s", **options):
    kl, gains = options.pop("kl", [1.0]), gain if isinstance(gain, list) else [gain]
    return Record(method, setting, repetition, 0, kl, [2.0 + g for g in gains], 2.0, **options)


def test_gain_at_a_kl_by_hand():
    run = record([1.0, 2.0, 5.0], kl=[0.04, 0.16, 0.09])
    # Over √KL: 0.2 → 1, 0.4 → 2, then back. Before the first point from the reference at (0, 0).
    assert run.gain_at(0.01) == pytest.approx(0.5)
    assert run.gain_at(0.04) == pytest.approx(1.0)
    assert run.gain_at(0.09) == pytest.approx(1.5)  # the first time, on the way out
    assert run.gain_at(0.17) is None
    assert run.gain == pytest.approx(3.0 + 2)
    assert record([1.0, 2.0], kl=[0.1, 0.2], final=0).gain == pytest.approx(1.0)
    # An estimate below zero is a KL of zero.
    assert record([9.0, 1.0], kl=[-0.3, 1.0]).gain_at(0.25) == pytest.approx(5.0)


def test_averages_of_neighbouring_points_by_hand():
    run = record([3.0, 6.0, 0.0, 9.0], kl=[0.0, 1.0, 2.0, 6.0])
    smooth = run.smoothed(3)
    assert smooth.kl == pytest.approx([1.0, 3.0])
    assert smooth.gain == pytest.approx(5.0)  # (6 + 0 + 9) / 3, the last points
    assert smooth.gain_at(1.0) == pytest.approx(3.0)
    assert run.smoothed(1) == run
    # A run shorter than the window is one point.
    assert run.smoothed(9).kl == pytest.approx([2.25])
    # A run that is judged by a point on its way has no last mean to be judged by.
    with pytest.raises(ValueError, match=r"analysis\.window: expected 1 where runs are judged by point 1"):
        record([3.0, 6.0, 0.0], kl=[0.0, 1.0, 2.0], final=1).smoothed(2)


def test_a_report_compares_averages_where_points_are_estimates(tmp_path):
    def final(window, name):
        study = Study(Toy(), str(tmp_path / name), repetitions=3, analysis=Analysis(window=window))
        results = run(study, {"name": name})
        noisy = [record([0.0, 4.0 + n, n], kl=[1.0, 2.0, 3.0], repetition=n) for n in range(3)]
        report(study, {}, results._replace(records=noisy))
        (row,) = json.loads((tmp_path / name / "summary.json").read_text())["methods"]
        return row["gain"]["value"]

    assert final(1, "points") == 1
    assert final(2, "averages") == 3
    with pytest.raises(ValueError, match=r"analysis\.window: expected at least 1, got 0"):
        Analysis(window=0)


def test_runs_that_never_reach_a_level_are_counted_and_paired_without():
    runs = [
        record([1.0 + n], method=m, repetition=n, kl=[0.5 if m == "b" and n < 2 else 2.0])
        for n in range(5)
        for m in "ab"
    ]
    analysis = Analysis(baselines=["a"], kl=[1.0])
    found = {(o.method, o.point): o for o in outcomes(runs, analysis)}
    assert found["b", "KL 1"].unreached == 2
    assert found["b", "KL 1"].row()["n"] == 3
    assert found["b", "final"].row()["n"] == 5
    rows = compare(list(found.values()), analysis)
    assert {(r["point"], r["n"]) for r in rows} == {("final", 5), ("KL 1", 3)}
    # A level that nobody reaches is no comparison, and no error.
    assert all(r["point"] == "final" for r in compare(outcomes(runs, Analysis(kl=[9.0])), Analysis(kl=[9.0])))


@pytest.mark.parametrize(
    ("effect", "p", "expected"),
    [
        (Interval(2.0, 1.5, 2.5), 0.01, HOLDS),
        (Interval(0.5, 0.3, 0.8), 0.01, FAILS),
        (Interval(1.5, 0.9, 2.5), 0.2, OPEN),
        (Interval(1.0, 0.95, 1.05), 0.9, FAILS),  # no effect worth having
        (Interval(2.0, 1.5, 2.5), 0.06, OPEN),  # the correction decides
        (Interval(1.2, 0.3, 3.6), 0.01, OPEN),  # the test of distances rejects, and the ratio says nothing
        (Interval(0.9, 0.7, 1.3), 0.01, OPEN),
        (Interval(1.02, 1.01, 1.05), 0.01, HOLDS),  # small and sure
        (None, 1.0, OPEN),
    ],
)
def test_verdicts(effect, p, expected):
    assert verdict(effect, none=1.0, smallest=1.1, p=p) == expected


def test_a_planted_effect_is_found_and_none_is_not():
    rng = np.random.default_rng(0)
    z, other = rng.standard_normal((2, 400))
    runs = []
    for n in range(400):
        runs.append(record(0.5 + z[n], "plain", n))
        runs.append(record(0.5 + 0.3 * z[n], "calm", n))
        runs.append(record(0.5 + other[n], "same", n))
    analysis = Analysis(baselines=["plain"])
    rows = {r["method"]: r for r in compare(outcomes(runs, analysis), analysis)}
    assert rows["calm"]["variance_verdict"] == rows["calm"]["risk_verdict"] == HOLDS
    assert rows["calm"]["variance_ratio"].value == pytest.approx(1 / 0.09)
    assert rows["same"]["variance_verdict"] != HOLDS
    assert rows["same"]["risk_verdict"] != HOLDS
    assert rows["calm"]["variance_needs"] < 400
    assert rows["calm"]["paired_p_holm"] == pytest.approx(2 * rows["calm"]["paired_p"], abs=0)
    said = sentences(list(rows.values()), [])
    assert len(said) == 4
    assert said[0].startswith("**calm** varies less than **plain**: with its final policy this holds (ratio 11.1, 95% ")


def test_two_baselines_are_compared_once():
    runs = [record(float(n + k), method, n) for n in range(3) for k, method in enumerate("xab")]
    analysis = Analysis(baselines=["a", "b"])
    rows = compare(outcomes(runs, analysis), analysis)
    assert [(r["method"], r["baseline"]) for r in rows] == [("x", "a"), ("b", "a"), ("x", "b")]
    # A baseline of other settings alone is no mistake; one that nobody has is.
    runs += [record(float(n), method, n, setting="other") for n in range(3) for method in "zy"]
    assert ("z", "y") in {(r["method"], r["baseline"]) for r in compare(outcomes(runs, analysis), analysis)}
    with pytest.raises(ValueError, match=r"analysis\.baselines: expected some of the methods 'x', .*, got 'bsae'"):
        compare(outcomes(runs, analysis), Analysis(baselines=["a", "bsae"]))


def test_formulas_by_hand():
    runs = [record(-1.0 if n < 30 else 1.0, repetition=n, extra={"exact_risk": 0.2}) for n in range(100)]
    (row,) = formulas(runs)
    # 30 of 100 where 20 are expected, standard error √(0.2 · 0.8 / 100) = 0.04.
    assert (row["seen"], row["exact"], row["standard_error"]) == pytest.approx((0.3, 0.2, 0.04))
    assert row["z"] == pytest.approx(2.5)
    assert "holds" in sentences([], [row])[0]
    assert "does not hold" in sentences([], [row | {"z": 3.2}])[0]


def test_further_figures_are_means_over_the_repetitions_that_have_them(tmp_path):
    runs = [record(float(n), repetition=n, extra={"sigma": n} | ({"rare": 5.0} if n else {})) for n in range(3)]
    runs += [record(1.0, "bare"), record(1.0, "exact", extra={"exact_risk": 0.2})]
    assert further(runs) == [{"setting": "s", "method": "m", "sigma": 1.0, "rare": 5.0}]
    study = Study(Toy(), str(tmp_path / "more"), repetitions=1)
    report(study, {}, run(study, {})._replace(records=runs))
    assert json.loads((tmp_path / "more" / "summary.json").read_text())["further"] == further(runs)
    assert "| s | m | 1 | 5 |" in (tmp_path / "more" / "report.md").read_text()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "toy"
    study = Study(Toy(fails=[3]), str(folder), repetitions=30, analysis=Analysis(baselines=["bold"], kl=[1.0]))
    config = {"experiment": {"class_path": "Toy"}, "seed": 0, "repetitions": 30}
    return folder, report(study, config, run(study, config))


def test_pages_say_everything(toy):
    folder, claims = toy
    assert [c.partition(":")[0] for c in claims] == [
        "**calm** varies less than **bold**",
        "**calm** ends worse than the reference less often than **bold**",
    ]
    summary = json.loads((folder / "summary.json").read_text())
    assert {"config", "versions", "state", "claims", "methods", "comparisons", "failures"} <= summary.keys()
    ratio = summary["comparisons"][0]["variance_ratio"]
    assert ratio["low"] < ratio["value"] < ratio["high"]
    unreached = [m["unreached"] for m in summary["methods"] if m["point"] == "KL 1" and m["method"] == "calm"]
    assert sum(unreached) == 3 * 15  # the even ones; the failed one is odd
    for name in ("report.md", "report.html"):
        page = (folder / name).read_text()
        assert "no luck with 3" in page
        assert "89 of 90 repetitions finished" in page
        assert "varies less than" in page
    html = (folder / "report.html").read_text()
    assert set(re.findall(r'src="(.{22})', html)) == {"data:image/png;base64,"}
    assert "<script" not in html
    assert "<li><b>" in html
    assert "<li>" not in re.sub(r"<ul>.*?</ul>", "", html)
    for picture in re.findall(r"\]\((pictures/[^)]+)\)", (folder / "report.md").read_text()):
        assert (folder / picture).is_file()


def test_two_repetitions_are_enough_for_a_report_and_for_no_claim(tmp_path):
    study = Study(Toy(), str(tmp_path / "two"), repetitions=2, analysis=Analysis(baselines=["bold"]))
    claims = report(study, {"experiment": {}, "seed": 0}, run(study, {"experiment": {}, "seed": 0}))
    assert all("is undecided at this sample size in 3 of 3 settings" in claim for claim in claims)
    (row, *_) = json.loads((tmp_path / "two" / "summary.json").read_text())["comparisons"]
    assert row["variance_ratio"]["high"] is None
    assert row["levene_p"] == row["paired_p"] == 1.0


def test_a_report_needs_something_finished(tmp_path):
    study = Study(Toy(), str(tmp_path), repetitions=2)
    with pytest.raises(ValueError, match="has no finished repetition"):
        report(study, {}, type("Nothing", (), {"records": [], "failures": []})())


# The command and the shipped configs.

# Those that need a prepared folder run in test_study_language.py.
STUDIES = [f for f in sorted((CONFIGS / "study").glob("*.yaml")) if "prepared:" not in f.read_text()]
SMALL = """
output: {folder}
repetitions: 12
experiment:
  class_path: lit_vapo.study.experiments.tabular.Optima
  init_args:
    noise_ratio: [10]
    members: [3]
    correlation: [0]
    kl_coef: [4]
    methods:
      mean:
        objective: lit_vapo.objectives.mean_reward.MeanReward
      variance-aware:
        objective: lit_vapo.objectives.variance_aware.VarianceAware
analysis:
  baselines: [mean]
"""


def test_command_runs_reports_and_refuses(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lit_vapo.study.report._draw", lambda *_: {})
    folder, config = tmp_path / "out", tmp_path / "small.yaml"
    config.write_text(SMALL.format(folder=folder))
    main(["study", "run", f"--config={config}"])
    said = capsys.readouterr().out
    assert "variance-aware varies less than mean: with its final policy this" in said
    page = (folder / "report.md").read_text()
    # From another place to the same: the report is made anew from the results.
    (folder / "report.md").unlink()
    main(["study", "report", f"--config={config}"])
    assert (folder / "report.md").read_text() == page
    # A folder is enough.
    (folder / "report.md").unlink()
    main(["study", "report", f"--config={folder / 'config.yaml'}"])
    assert (folder / "report.md").read_text() == page
    logged = []
    monkeypatch.setattr("lit_vapo.study.command.track", lambda study, *_: logged.append((study.output, _[-1])))
    main(["study", "report", f"--config={config}", "--project=mine"])
    assert logged == [(str(folder), "mine")]
    assert "mine" not in (folder / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"experiment.init_args.noise: 4.0 there, 2.0 here"):
        main(["study", "run", f"--config={config}", "--experiment.init_args.noise=2"])
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ValueError, match=r"output: expected the folder of a study, got '.*nowhere'"):
        main(["study", "report", f"--config={config}", f"--output={nowhere}"])
    assert not nowhere.exists()
    main(["study", "run", f"--config={config}", "--repetitions=20", "--shard=0/2"])
    assert (folder / "results.jsonl").read_text().count("\n") == 40


@pytest.mark.parametrize("words", [["study"], ["study", "fit"]])
def test_a_study_wants_a_command(words):
    with pytest.raises(ValueError, match="study run or study report, got 'study"):
        main(words)


@pytest.mark.parametrize("file", STUDIES, ids=lambda f: f.stem)
def test_shipped_studies_run_and_are_reproducible(file):
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Study, as_group=False)
    given = parser.instantiate_classes(parser.parse_args([f"--config={file}"]))
    experiment = pickle.loads(pickle.dumps(given.experiment))  # as on its way to a worker
    assert experiment.settings
    assert not any("/" in name for name in experiment.settings)
    for setting in list(experiment.settings)[:: max(1, len(experiment.settings) - 1)]:
        two = [Repetition(n, seed_of(0, setting, n)) for n in range(2)]
        records = experiment.run_block(setting, two)
        assert [vars(r) for r in experiment.run_block(setting, two)] == [vars(r) for r in records]
        methods = {r.method for r in records}
        assert sorted((r.method, r.repetition) for r in records) == sorted((m, n) for m in methods for n in range(2))
        assert {r.setting for r in records} == {setting}
        assert set(given.analysis.baselines) & methods
        # The reference is the same for every method of a repetition.
        assert len({(r.repetition, r.reference_return) for r in records}) == 2
