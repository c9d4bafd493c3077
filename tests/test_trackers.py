"""Trackers that fail: a run goes on without them, ends with 0, and its own files are whole."""

import csv
import json
import os
import pickle
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from helpers import CONFIGS
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from services import says, service

from lit_vapo.cli import main
from lit_vapo.trackers import PATIENCE, Lasting, lasting, log_configuration, log_picture, log_table

TESTS = Path(__file__).parent
CALLS = {
    "log_metrics": ({"train/loss": 1.0},),
    "log_hyperparams": ({"learning_rate": 0.1},),
    "log_graph": (None,),
    "save": (),
    "finalize": ("success",),
    "after_save_checkpoint": (None,),
    "of_its_own": (),
}


class Frail(Logger):
    """Notes its calls, and fails in one of them."""

    name, version = "frail", 3

    def __init__(self, fails=""):
        super().__init__()
        self.calls = []
        for name in CALLS:
            setattr(self, name, lambda *args, name=name, **kwargs: self._called(name, fails))

    def _called(self, name, fails):
        self.calls.append(name)
        if name == fails:
            raise OSError(28, "No space left on device")
        return name

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        pass


class Unreachable(WandbLogger):
    """W&B, but its server is not there."""

    tried = 0

    @property
    def experiment(self):
        type(self).tried += 1
        raise ConnectionError("nobody at home\nand much more")


def use(tracker):
    for name, args in CALLS.items():
        getattr(tracker, name)(*args)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_is_the_last_one(call):
    inner = Frail(call)
    tracker = Lasting(inner)
    with pytest.warns(UserWarning, match="Frail failed .*No space left .*; the run goes on, and its metrics.csv"):
        use(tracker)
    assert inner.calls == list(CALLS)[: list(CALLS).index(call) + 1]
    use(tracker)
    tracker.experiment.log({"a": 1})
    assert inner.calls[-1] == call


def test_a_tracker_that_works_gets_everything():
    inner = Frail()
    tracker = Lasting(inner)
    use(tracker)
    assert inner.calls == list(CALLS)
    assert tracker.of_its_own() == "of_its_own"
    assert (tracker.name, tracker.version, tracker.save_dir, tracker.log_dir, tracker.root_dir) == (
        ("frail", 3, None, None, None)
    )
    assert tracker.group_separator == "/"
    # It has none, which is no failure.
    tracker.experiment.log({"a": 1})
    assert tracker.tracker is inner
    with pytest.raises(AttributeError, match="no_such"):
        _ = tracker.no_such


def test_an_experiment_that_cannot_begin_is_tried_once():
    Unreachable.tried = 0
    tracker = Lasting(Unreachable())
    with pytest.warns(UserWarning, match="Unreachable failed .ConnectionError: nobody at home. and is") as said:
        use_of_ours([tracker])
    tracker.experiment.log({"a": 1})
    assert len(said) == 1
    assert Unreachable.tried == 1


def use_of_ours(loggers):
    log_table(loggers, "val/samples", ["prompt"], [["a"]])
    log_picture(loggers, "val/overoptimisation", Path("none.png"))
    log_configuration(loggers, {"seed": 1})


def test_what_is_said_to_wandb_alone_is_guarded_without_a_command_line_too():
    board = Unreachable()
    with pytest.warns(UserWarning, match="nobody at home"):
        log_table([board], "val/samples", ["prompt"], [["a"]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use_of_ours([Frail("of_its_own"), Lasting(Frail())])


def test_other_processes_get_a_copy_even_so():
    with pytest.warns(UserWarning, match="nobody at home"):
        copy = pickle.loads(pickle.dumps(Lasting(Unreachable())))
    copy.log_metrics({"a": 1.0})


def test_a_run_s_own_file_comes_first_and_is_not_guarded(tmp_path, monkeypatch):
    for name in PATIENCE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "7")
    own, board, frail = CSVLogger(str(tmp_path)), WandbLogger(offline=True), Frail()
    found = lasting([frail, board, own], str(tmp_path))
    assert found[0] is own
    assert [type(x) for x in found[1:]] == [Lasting, Lasting]
    assert [x.tracker for x in found[1:]] == [board, frail]
    (made,) = lasting([], str(tmp_path))
    assert made.log_dir == str(tmp_path / "logs" / "version_0")
    # What the user says counts.
    assert os.environ["WANDB_INIT_TIMEOUT"] == "7"
    assert os.environ["WANDB_FINISH_TIMEOUT"] == PATIENCE["WANDB_FINISH_TIMEOUT"]
    monkeypatch.delenv("WANDB_FINISH_TIMEOUT")


def test_only_one_file_knows_the_name_of_wandb():
    package = TESTS.parent / "lit_vapo"
    assert [p.name for p in package.rglob("*.py") if "wandb" in _but_for_its_config(p.read_text().lower())] == [
        "trackers.py"
    ]


def _but_for_its_config(text: str) -> str:
    return text.replace("configs/logger/wandb.yaml", "")


# Real runs. W&B's own threads fail, too, in a way that it does not catch.


threads_fail = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def wandb(monkeypatch):
    """W&B as a new process finds it, with a key that is none."""
    import wandb

    end(wandb)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    yield wandb
    end(wandb)


def end(wandb):
    """What W&B does at the end of a process."""
    wandb.finish()
    wandb.teardown()


def failures(words):
    """What a run says of trackers that fail."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        main(words)
    return [str(x.message) for x in said if "is left alone from here on" in str(x.message)]


def options(folder, *more):
    return [f"--config={CONFIGS / 'logger' / 'wandb.yaml'}", f"--trainer.logger.init_args.save_dir={folder}", *more]


def check_whole(run, steps):
    assert json.loads((run / "finished.json").read_text())["steps"] == steps
    assert (run / "checkpoints" / "last.ckpt").is_file()
    (file,) = run.glob("logs/version_*/metrics.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(steps))


@threads_fail
def test_a_server_that_is_not_there_keeps_nobody_waiting(stage_args, tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    started = time.monotonic()
    (said,) = failures(stage_args("sft", "fit", tmp_path / "run", *options(tmp_path)))
    end(wandb)
    assert time.monotonic() - started < 60
    assert re.match("WandbLogger failed .CommError: .*refused. and is left alone", said)
    check_whole(tmp_path / "run", 2)


@threads_fail
def test_a_server_that_goes_away_keeps_nobody_waiting(stage_args, tmp_path, wandb, monkeypatch):
    me = {"id": "1", "name": "me"}
    bucket = {"id": "1", "name": "one", "displayName": "one", "project": {"id": "1", "name": "p", "entity": me}}
    viewer = {"id": "1", "entity": "me", "flags": "{}", "teams": {"edges": []}}
    known = {"UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}}, "Viewer": {"viewer": viewer}}

    def answer(number, request):
        # All but the beginning gets no answer.
        found = known.get(request.get("operationName", ""))
        return None if found is None else says(body={"data": found})

    with service(answer) as there:
        monkeypatch.setenv("WANDB_BASE_URL", there.url)
        monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
        with pytest.warns(UserWarning, match="W&B does not answer .*; what the run has read and made is not told"):
            main(stage_args("sft", "fit", tmp_path / "run", *options(tmp_path)))
        started = time.monotonic()
        end(wandb)
        assert 0.9 < time.monotonic() - started < 30
    assert any("files" in body for body in there.bodies)
    check_whole(tmp_path / "run", 2)


@threads_fail
def test_figures_that_cannot_be_sent_end_no_run(stage_args, tmp_path, wandb, monkeypatch):
    def full(self, metrics, step=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WandbLogger, "log_metrics", full)
    offline = "--trainer.logger.init_args.offline=true"
    (said,) = failures(stage_args("sft", "fit", tmp_path / "run", *options(tmp_path, offline)))
    assert "No space left on device" in said
    check_whole(tmp_path / "run", 2)


def test_a_service_process_that_dies_takes_nothing_along(stage_args, tmp_path):
    more = ["--trainer.logger.init_args.offline=true", "--trainer.callbacks+=killing.KillChildren"]
    words = stage_args("sft", "fit", tmp_path / "run", *options(tmp_path, *more), trainer__max_steps=4)
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, "-m", "lit_vapo", *words],
        env={**{k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}, "PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("WandbLogger failed (") == 1
    assert "Traceback" not in done.stderr
    check_whole(tmp_path / "run", 4)
