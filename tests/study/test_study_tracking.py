"""A study in W&B: a run for each method and setting, in one group, the same one when it is told again."""

import json

import pytest
from study_experiments import Toy
from test_wandb import finished

from lit_vapo.study.execution import Results, Study
from lit_vapo.study.experiment import Record
from lit_vapo.study.tracking import track

wandb = pytest.importorskip("wandb")
CONFIG = {"experiment": {"class_path": "Toy"}, "seed": 0, "repetitions": 2}


def record(method, number, kl, true_return):
    return Record(method, "a", number, number, kl, true_return, reference_return=1.0)


RECORDS = [
    record("bold", 0, [0.0, 2.0], [1.0, 3.0]),
    record("bold", 1, [1.0, 4.0, 6.0], [0.0, 0.5, 0.5]),
    record("calm", 0, [0.5], [1.5]),
]


def told(folder, records=RECORDS, config=CONFIG, name="toy"):
    """What W&B keeps of each run, by its name."""
    folder.mkdir()
    study = Study(Toy(), str(folder / name), repetitions=2)
    (folder / name).mkdir()
    track(study, config, Results(records, [], {}, []), "mine")
    runs = {}
    for file in (folder / name).glob("wandb/offline-run-*/run-*.wandb"):
        found = finished(file)
        (about,) = [r.run for r in found if r.HasField("run")]
        history = [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in r.history.item} for r in found]
        summary = {i.key or "/".join(i.nested_key): i.value_json for r in found for i in r.summary.update}
        rows = [{k: v for k, v in row.items() if k.startswith("study/")} for row in history if row]
        runs[about.display_name] = (about, rows, summary)
    return runs


def test_the_runs_of_a_study_are_one_group(tmp_path):
    runs = told(tmp_path / "first")
    assert runs.keys() == {"a/bold", "a/calm"}
    abouts = [about for about, _, _ in runs.values()]
    (group,) = {about.run_group for about in abouts}
    assert group.startswith("toy-")
    assert {(about.project, about.job_type) for about in abouts} == {("mine", "a")}
    # Told again, they are the same; of more repetitions, others of the same group.
    again = told(tmp_path / "second")
    assert {name: about.run_id for name, (about, _, _) in again.items()} == {
        name: about.run_id for name, (about, _, _) in runs.items()
    }
    more = told(tmp_path / "third", [*RECORDS, record("calm", 1, [0.5], [2.5])], {**CONFIG, "repetitions": 3})
    assert {about.run_group for about, _, _ in more.values()} == {group}
    assert more["a/calm"][0].run_id != runs["a/calm"][0].run_id
    other = told(tmp_path / "fourth", config={**CONFIG, "seed": 1})
    assert {about.run_group for about, _, _ in other.values()} != {group}


def test_points_are_means_over_repetitions(tmp_path):
    _, rows, summary = told(tmp_path / "first")["a/bold"]
    # KL (0+1)/2, (2+4)/2, 6; gains ((1-1)+(0-1))/2, ((3-1)+(0.5-1))/2, 0.5-1.
    assert rows == [
        {"study/kl": 0.5, "study/gain": -0.5},
        {"study/kl": 3.0, "study/gain": 0.75},
        {"study/kl": 6.0, "study/gain": -0.5},
    ]
    # The ends: gains of 2 and -0.5, one of two below zero.
    assert json.loads(summary["study/final_gain"]) == 0.75
    assert json.loads(summary["study/risk"]) == 0.5
    assert json.loads(summary["study/repetitions"]) == 2


def test_a_tracker_that_fails_loses_nothing_else(tmp_path, monkeypatch):
    def broken(**kwargs):
        raise ConnectionError("nobody at home\nand more")

    monkeypatch.setattr(wandb, "init", broken)
    with pytest.warns(UserWarning, match="W&B failed .ConnectionError: nobody at home.; what is in .* is complete"):
        assert told(tmp_path / "first") == {}
