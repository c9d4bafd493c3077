"""A study may be killed, sharded, continued and grown, and its results are the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from study_experiments import Toy

from lit_vapo.study import execution
from lit_vapo.study.execution import Study, merge, missing_parts, run
from lit_vapo.study.experiment import Record, seed_of

HERE = Path(__file__).resolve().parent


def config_of(study):
    inner = {"class_path": "Toy", "init_args": {"scale": study.experiment.scale}}
    return {"experiment": inner, "seed": study.seed, "repetitions": study.repetitions}


def start(folder, repetitions=6, seed=0, options=None, **toy):
    study = Study(Toy(**toy), str(folder), repetitions=repetitions, seed=seed)
    return study, run(study, config_of(study), **(options or {}))


def text(folder):
    return (Path(folder) / "results.jsonl").read_text()


def test_every_repetition_has_its_records_in_order(tmp_path):
    study, results = start(tmp_path, repetitions=3)
    assert results.missing == {"c": 0, "a": 0, "b": 0}
    keys = [(r.setting, r.repetition, r.method) for r in results.records]
    assert keys == [(s, n, m) for s in "cab" for n in range(3) for m in ("bold", "calm")]
    lines = [json.loads(line) for line in text(tmp_path).splitlines()]
    assert [Record(**line) for line in lines] == results.records
    assert results.records[0].seed == seed_of(0, "c", 0)
    assert len({r.seed for r in results.records}) == 9  # its own for each setting and repetition, shared by methods
    about = json.loads((tmp_path / "study.json").read_text())
    assert about["config"] == config_of(study)
    assert {"python", "torch", "numpy", "scipy"} <= about["versions"].keys()


def test_every_set_of_versions_is_told(tmp_path, monkeypatch):
    _, results = start(tmp_path, repetitions=1)
    assert len(results.versions) == 1
    monkeypatch.setattr(execution, "versions", lambda: {"torch": "99"})
    _, results = start(tmp_path, repetitions=2)
    assert len(results.versions) == 2
    assert {"torch": "99"} in results.versions


def test_seeds_are_the_same_everywhere():
    # The first eight bytes of SHA-256 of "0/x/0", halved.
    assert seed_of(0, "x", 0) == 0x6C6C5B2B9F574403
    assert seed_of(0, "x", 0) != seed_of(0, "x", 1) != seed_of(1, "x", 0)


def test_a_second_start_does_only_what_is_missing(tmp_path, monkeypatch):
    start(tmp_path, block_size=2)
    whole = text(tmp_path)
    (tmp_path / "parts" / "a" / "000002-000003.json").unlink()
    ran, run_block = [], Toy.run_block
    monkeypatch.setattr(Toy, "run_block", lambda self, s, r: ran.append((s, len(r))) or run_block(self, s, r))
    start(tmp_path, block_size=2)
    assert ran == [("a", 2)]
    assert text(tmp_path) == whole


def test_a_killed_study_ends_like_one_that_was_not(tmp_path):
    start(tmp_path / "whole", repetitions=20, seconds=0)
    # Two parts at once, and in threads: each process would have to load torch first.
    code = (
        "from study_experiments import Toy; from test_study_execution import start; "
        f"start({str(tmp_path / 'killed')!r}, repetitions=20, seconds=0.05, "
        "options={'jobs': 2, 'backend': 'threading'})"
    )
    path = os.pathsep.join(map(str, [HERE, HERE.parent, HERE.parents[1]]))
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, start_new_session=True
    )
    parts = tmp_path / "killed" / "parts"
    deadline = time.monotonic() + 300
    while len(list(parts.glob("*/*.json"))) < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # with its workers
    process.wait()
    done = len(list(parts.glob("*/*.json")))
    assert 7 <= done < 60
    # What a kill in the middle of writing leaves behind.
    (parts / "b").mkdir(exist_ok=True)
    (parts / "b" / ".000019-000019.json.1.partial").write_text('{"records": [')
    _, results = start(tmp_path / "killed", repetitions=20, seconds=0)
    assert sum(results.missing.values()) == 0
    assert text(tmp_path / "killed") == text(tmp_path / "whole")


def test_shards_share_the_work_and_the_last_one_has_all(tmp_path):
    start(tmp_path / "whole", block_size=2)
    counts = []
    for i in (2, 0, 1):
        _, results = start(tmp_path / "shards", block_size=2, options={"shard": f"{i}/3"})
        counts.append(sum(results.missing.values()))
    assert counts == [12, 6, 0]
    assert text(tmp_path / "shards") == text(tmp_path / "whole")


def test_a_study_can_grow(tmp_path):
    start(tmp_path / "whole", repetitions=7, block_size=4)
    start(tmp_path / "grown", repetitions=3, block_size=4)
    start(tmp_path / "grown", repetitions=7, block_size=4)
    assert text(tmp_path / "grown") == text(tmp_path / "whole")
    # And be asked for less: what is beyond stays on disk.
    _, results = start(tmp_path / "grown", repetitions=2, block_size=4)
    assert {r.repetition for r in results.records} == {0, 1}


def test_a_failure_is_recorded_and_tried_again_when_asked(tmp_path):
    study, results = start(tmp_path, fails=[1, 4])
    assert [(f["setting"], f["repetition"], f["error"]) for f in results.failures] == [
        ("b", 1, "RuntimeError: no luck with 1"),
        ("b", 4, "RuntimeError: no luck with 4"),
    ]
    assert results.missing["b"] == 0
    assert len([r for r in results.records if r.setting == "b"]) == 8
    assert "no luck with 4" in text(tmp_path)
    kept = json.loads((tmp_path / "parts" / "b" / "000001-000001.failed.json").read_text())
    assert "study_experiments.py" in kept["traceback"]
    # Left alone by a second start; run again when asked.
    study.experiment.fails = []
    assert list(missing_parts(study)) == []
    # A share of the study tries again what is its own, and leaves the failures of others as they are.
    own = [place for place, _ in missing_parts(study, retry_failed=True)]
    assert len(own) == 2
    results = run(study, config_of(study), retry_failed=True, shard=f"{own[0] % 2}/2")
    kept = [f["repetition"] for f in results.failures]
    assert kept == [n for place, n in zip(own, (1, 4), strict=True) if place % 2 != own[0] % 2] != []
    results = run(study, config_of(study), retry_failed=True)
    assert results.failures == []
    assert list((tmp_path / "parts").glob("*/*failed*")) == []
    assert len([r for r in results.records if r.setting == "b"]) == 12
    assert merge(study) == results


def test_a_failure_that_another_shard_takes_away_while_it_is_read_is_no_error(tmp_path, monkeypatch):
    study, results = start(tmp_path)
    listed = execution._files
    gone = tmp_path / "parts" / "b" / "000003-000003.failed.json"
    monkeypatch.setattr(execution, "_files", lambda *given: [*listed(*given), gone])
    assert merge(study) == results


def test_results_of_another_configuration_are_refused(tmp_path):
    start(tmp_path, repetitions=1)
    with pytest.raises(ValueError, match=r"experiment.init_args.scale: 1.0 there, 2.0 here"):
        start(tmp_path, repetitions=1, scale=2.0)
    with pytest.raises(ValueError, match=r"holds results of another configuration.*seed: 0 there, 5 here"):
        start(tmp_path, repetitions=1, seed=5)


@pytest.mark.parametrize("shard", ["1", "2/2", "a/b", "0/0", "-1/2"])
def test_bad_shards_are_refused(tmp_path, shard):
    with pytest.raises(ValueError, match=r"shard: expected i/n with 0 <= i < n"):
        start(tmp_path, options={"shard": shard})


def test_bad_records_are_refused():
    good = {"method": "m", "setting": "s", "repetition": 3, "seed": 1, "kl": [0.1], "true_return": [1.0]}
    good["reference_return"] = 0.0
    for change, message in (
        ({"kl": []}, "s, m, repetition 3: expected kl and true_return of the same length >= 1, got 0 and 1"),
        ({"true_return": [float("nan")]}, "s, m, repetition 3: expected finite numbers"),
        ({"final": 1}, "expected final to be one of 1 points, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Record(**good | change)
    with pytest.raises(ValueError, match="repetitions: expected at least 1, got 0"):
        Study(Toy(), "x", repetitions=0)
