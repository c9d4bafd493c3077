"""The folder of a run: nobody else's files are touched, one run at a time holds it, checkpoints are whole."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest
import torch
import yaml
from helpers import last

from lit_vapo.callbacks.checkpoint import RunCheckpoint, WholeCheckpointIO
from lit_vapo.cli import STAGES, main
from lit_vapo.commands.run_folder import CLAIM, Claim, check_folders
from lit_vapo.stages.sft.module import SFTModule


def saved_config(folder):
    return max(folder.glob("logs/version_*/config.yaml"))


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# What a run saves of itself.


@pytest.mark.parametrize("stage", STAGES)
def test_a_saved_config_run_again_elsewhere_leaves_the_first_run_alone(request, tmp_path, stage):
    first = request.getfixturevalue(f"{stage}_run")
    before = contents(first)
    main([stage, "fit", f"--config={saved_config(first)}", f"--trainer.default_root_dir={tmp_path / 'second'}"])
    assert last(tmp_path / "second").is_file()
    assert contents(first) == before


def test_leave_to_overwrite_is_for_one_run(stage_args, held):
    main(stage_args("sft", "fit", held, "--overwrite=true"))
    assert yaml.safe_load(saved_config(held).read_text())["overwrite"] is False
    with pytest.raises(ValueError, match="expected a folder without a run"):
        main(["sft", "fit", f"--config={saved_config(held)}"])


@pytest.fixture
def held(sft_run, tmp_path):
    """A copy of a finished run, to do with as one likes."""
    return shutil.copytree(sft_run, tmp_path / "held")


@pytest.mark.parametrize("options", [(), ("--overwrite=true",), ("--ckpt_path={last}",)])
def test_checkpoints_go_into_no_other_run(stage_args, held, tmp_path, untrained, options):
    before = contents(held)
    given = [option.format(last=last(held)) for option in options]
    message = (
        rf"checkpoint.dirpath: expected a folder of this run .*, got {held}/checkpoints, and another run left {held}"
    )
    with pytest.raises(ValueError, match=message):
        main(stage_args("sft", "fit", tmp_path / "run", *given, checkpoint__dirpath=held / "checkpoints"))
    # One that was interrupted, without the mark of a finished one, is a run too.
    (held / "finished.json").unlink()
    if "ckpt_path" not in str(options):
        with pytest.raises(ValueError, match=message):
            main(stage_args("sft", "fit", tmp_path / "run", *given, checkpoint__dirpath=held / "checkpoints"))
    assert {**contents(held), **{k: v for k, v in before.items() if k.name == "finished.json"}} == before


def test_checkpoints_may_go_to_a_folder_of_their_own(stage_args, tmp_path):
    main(stage_args("sft", "fit", tmp_path / "run", checkpoint__dirpath=tmp_path / "disk"))
    assert (tmp_path / "disk" / "last.ckpt").is_file()
    assert not (tmp_path / "run" / "checkpoints").exists()


# Who holds it.


def test_a_second_run_is_refused_while_the_first_one_lives(stage_args, tmp_path, monkeypatch):
    original, seen = SFTModule.training_step, []

    def step(self, batch, batch_idx):
        if not seen:
            seen.append(json.loads((tmp_path / "run" / CLAIM).read_text()))
            for options in ((), ("--overwrite=true",)):
                with pytest.raises(ValueError, match="expected a folder that no other run uses, got .*/run, held by {"):
                    main(stage_args("sft", "fit", tmp_path / "run", *options))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(SFTModule, "training_step", step)
    main(stage_args("sft", "fit", tmp_path / "run"))
    assert seen[0]["process"] == os.getpid()
    assert (tmp_path / "run" / "finished.json").is_file()
    assert not (tmp_path / "run" / CLAIM).exists()


HOLD = """
import sys, time
from pathlib import Path
from lit_vapo.commands.run_folder import Claim
claim = Claim(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_process_of_a_dead_one_holds_nothing(tmp_path):
    claim = Claim(tmp_path)
    end, other = os.pipe()
    begun, told = os.pipe()
    child = os.fork()
    if child == 0:
        # It lives on, as one that prepares batches does until it notices.
        os.write(told, b"x")
        os.read(end, 1)
        os._exit(0)
    os.read(begun, 1)
    try:
        claim.file.close()
        Claim(tmp_path).release()
    finally:
        os.write(other, b"x")
        os.waitpid(child, 0)


def test_a_dead_process_holds_nothing(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f'"process": {process.pid}'):
            Claim(tmp_path)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert (tmp_path / CLAIM).is_file()
    Claim(tmp_path).release()
    assert not (tmp_path / CLAIM).exists()


def test_a_run_that_is_refused_leaves_no_folder(stage_args, tmp_path):
    with pytest.raises(ValueError, match="model.learning_rate"):
        main(stage_args("sft", "fit", tmp_path / "run", model__learning_rate=-1))
    assert not (tmp_path / "run").exists()


# Folders that take nothing. Root may do everything, but not there.


@pytest.fixture
def unloaded(monkeypatch):
    """Fail if a model's folder is even looked at."""

    def look(*args):
        raise AssertionError("models were looked at")

    monkeypatch.setattr("lit_vapo.commands.run.check_models", look)


@pytest.mark.parametrize("where", ["/proc/run", "/proc/deep/run", "{tmp}/file/run", "{tmp}/file", "{tmp}/nowhere"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_models_load(stage_args, tmp_path, unloaded, where):
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    folder, before = where.format(tmp=tmp_path), sorted(tmp_path.iterdir())
    reason = "Not a directory" if "file" in where else "No such file or directory"
    message = f"trainer.default_root_dir: expected a folder that can be written to, got {folder}: {reason}"
    with pytest.raises(ValueError, match=re.escape(message)):
        main(stage_args("sft", "fit", folder))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("stage", "option"),
    [("sft", "checkpoint.dirpath"), ("ppo", "checkpoint.dirpath"), ("reward", "model.feature_cache")],
)
def test_other_folders_of_a_run_are_looked_at_too(stage_args, tmp_path, unloaded, stage, option):
    more = {"model__reward": tmp_path} if stage == "ppo" else {}
    with pytest.raises(ValueError, match=f"{option}: expected a folder that can be .* got /proc/there: No such file"):
        main(stage_args(stage, "fit", tmp_path / "run", f"--{option}=/proc/there", **more))
    assert not (tmp_path / "run").exists()


def test_features_that_are_there_may_be_read_only(tmp_path):
    check_folders(tmp_path / "run", None, "/proc/self")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def mounted(tmp_path):
    """A small file system, mounted with the options that are asked for."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("may not mount")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True, check=False)


def test_a_read_only_disk_is_refused(mounted):
    folder = mounted("ro")
    with pytest.raises(ValueError, match=f"got {folder}/run: Read-only file system"):
        check_folders(folder / "run", None, None)


def test_a_full_disk_is_refused(mounted):
    folder = mounted("size=16k")
    check_folders(folder / "run", folder / "checkpoints", None)
    (folder / "much").write_bytes(bytes(2**14))
    with pytest.raises(ValueError, match=f"checkpoint.dirpath: .* got {folder}/checkpoints: No space left on device"):
        check_folders(folder.parent, folder / "checkpoints", None)


@pytest.mark.parametrize("stage", STAGES)
def test_a_trial_leaves_nothing_behind(request, stage_args, tmp_path, stage):
    reward = {"model__reward": request.getfixturevalue("tiny_ensemble_dir")} if stage == "ppo" else {}
    main(stage_args(stage, "fit", tmp_path / "run", trainer__fast_dev_run="true", **reward))
    assert list(tmp_path.iterdir()) == []


def test_a_trial_leaves_a_run_as_it_is(stage_args, held):
    before = contents(held)
    main(stage_args("sft", "fit", held, "--overwrite=true", trainer__fast_dev_run="true"))
    assert contents(held) == before


# How it ends.


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_told_to_end_is_not_finished(request, stage_args, tmp_path, monkeypatch, stage):
    reward = {"model__reward": request.getfixturevalue("tiny_ensemble_dir")} if stage == "ppo" else {}
    original = RunCheckpoint.on_train_batch_end

    def end(self, *args, **kwargs):
        original(self, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunCheckpoint, "on_train_batch_end", end)
    with pytest.raises(SystemExit) as ending:
        main(stage_args(stage, "fit", tmp_path / "run", trainer__max_steps=-1, trainer__max_epochs=50, **reward))
    assert ending.value.code == 143
    assert not (tmp_path / "run" / "finished.json").exists()
    assert not (tmp_path / "run" / CLAIM).exists()


def test_an_interrupted_run_is_not_finished(stage_args, tmp_path, monkeypatch):
    def interrupt(self, batch, batch_idx):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(SFTModule, "training_step", interrupt)
    try:
        with pytest.raises(SystemExit) as ending:
            main(stage_args("sft", "fit", tmp_path / "run"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert ending.value.code == 130
    assert not (tmp_path / "run" / "finished.json").exists()


# Whole checkpoints.


class Unsaved:
    """Something whose saving fails half way."""

    def __reduce__(self):
        raise OSError(28, "No space left on device")


def test_a_checkpoint_that_fails_leaves_the_one_before(tmp_path):
    io, path = WholeCheckpointIO(), tmp_path / "new" / "last.ckpt"
    io.save_checkpoint({"weights": torch.ones(3)}, path)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        io.save_checkpoint({"weights": torch.zeros(1000), "more": Unsaved()}, path)
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True)["weights"].tolist() == [1.0, 1.0, 1.0]
    io.save_checkpoint({"weights": torch.zeros(2)}, path)
    assert torch.load(path, weights_only=True)["weights"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_checkpoints_need_no_other_disk(request, stage_args, tmp_path, monkeypatch, stage):
    reward = {"model__reward": request.getfixturevalue("tiny_ensemble_dir")} if stage == "ppo" else {}
    written = []
    original = WholeCheckpointIO.save_checkpoint

    def save(self, checkpoint, path, storage_options=None):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
        written.append(os.path.basename(path))
        original(self, checkpoint, path, storage_options)
        monkeypatch.setattr(tempfile, "tempdir", None)

    monkeypatch.setattr(WholeCheckpointIO, "save_checkpoint", save)
    torn = tmp_path / "run" / "checkpoints" / ".iteration=000002.ckpt.partial"
    torn.parent.mkdir(parents=True)
    others = [
        tmp_path / "run" / ".evaluations.csv.0a1b.partial",
        tmp_path / "run/logs/version_0/.metrics.csv.2c.partial",
    ]
    others[1].parent.mkdir(parents=True)
    for path in (torn, *others):
        path.write_text("what a killed process left")
    main(stage_args(stage, "fit", tmp_path / "run", **reward))
    names = {p.name for p in torn.parent.iterdir()}
    assert not any(path.exists() for path in others)
    assert last(tmp_path / "run").resolve().name == written[-1] == "iteration=000002.ckpt"
    assert names == {*written, "last.ckpt", *(["best.ckpt"] if stage == "sft" else [])}


# Which checkpoint.


@pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning")
@pytest.mark.parametrize("word", ["last", "best"])
def test_a_word_means_a_checkpoint_of_the_run(stage_args, tmp_path, word):
    folder = tmp_path / "run"
    monitor = (
        "--checkpoint.monitor=val/loss",
        "--trainer.limit_val_batches=1",
        "--trainer.limit_train_batches=2",
        "--trainer.val_check_interval=2",
    )
    main(stage_args("sft", "fit", folder, *monitor))
    moved = folder.rename(tmp_path / "moved")
    main(stage_args("sft", "fit", moved, *monitor, ckpt_path=word, trainer__max_steps=4))
    assert torch.load(last(moved), weights_only=True)["global_step"] == 4


@pytest.mark.parametrize("word", ["last", "best"])
def test_a_word_that_means_nothing_is_refused(stage_args, held, tmp_path, untrained, word):
    expected = {
        "last": "a run with a checkpoint in .* for the word 'last'",
        "best": r"a run that kept its best checkpoint \(checkp",
    }
    with pytest.raises(ValueError, match=f"--ckpt_path: expected {expected[word]}"):
        main(stage_args("sft", "fit", tmp_path / "empty", ckpt_path=word))


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_what_is_no_checkpoint_is_refused_before_models_load(stage_args, tmp_path, untrained, command):
    (tmp_path / "empty.ckpt").touch()
    for given in (tmp_path / "empty.ckpt", tmp_path):
        with pytest.raises(ValueError, match="--ckpt_path: expected a checkpoint, got '.*', which cannot be read"):
            main(stage_args("reward", command, tmp_path / "run", ckpt_path=given))


# Nothing to do.


@pytest.mark.parametrize("command", ["validate", "test"])
def test_random_members_are_not_judged(stage_args, tmp_path, command):
    message = f"--ckpt_path: expected the checkpoint of the ensemble to {command}, got none"
    with pytest.raises(ValueError, match=message):
        main(stage_args("reward", command, tmp_path / "run"))
    assert not (tmp_path / "run" / "test").exists()


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_only_a_policy_answers(stage_args, tmp_path, stage):
    with pytest.raises(ValueError, match=f"lit-vapo {stage}: expected fit, validate or test, got predict"):
        main(stage_args(stage, "predict", tmp_path / "run"))


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        ("sft", "validate"),
        ("sft", "test"),
        ("reward", "validate"),
        ("ppo", "validate"),
        ("ppo", "test"),
        ("ppo", "predict"),
    ],
)
def test_nothing_to_judge_is_an_error(request, stage_args, tmp_path, stage, command):
    given = {"ckpt_path": last(request.getfixturevalue(f"{stage}_run"))}
    if stage == "ppo":
        given["model__reward"] = request.getfixturevalue("tiny_ensemble_dir")
    given[f"trainer__limit_{command.removesuffix('date').replace('vali', 'val')}_batches"] = 0
    kind = "prompts" if stage == "ppo" else "preferences"
    with pytest.raises(ValueError, match=rf"data.{kind}_(test|validation): expected {kind} to .*, got none"):
        main(stage_args(stage, command, tmp_path / "run", **given))


@pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning")
@pytest.mark.parametrize("stage", STAGES)
def test_nothing_to_learn_is_an_error(request, stage_args, tmp_path, stage):
    run = request.getfixturevalue(f"{stage}_run")
    reward = {"model__reward": request.getfixturevalue("tiny_ensemble_dir")} if stage == "ppo" else {}
    with pytest.raises(ValueError, match="fit: expected at least one batch to train on, got none at step "):
        main(stage_args(stage, "fit", tmp_path / "run", ckpt_path=last(run), **reward))
    assert not (tmp_path / "run" / "finished.json").exists()


def test_rows_of_a_run_that_was_killed_before_its_first_checkpoint_are_written_again(stage_args, tmp_path):
    run = tmp_path / "run"
    for name in ("version_0", "version_1", "version_2"):
        (run / "logs" / name).mkdir(parents=True)
        (run / "logs" / name / "metrics.csv").write_text("of another time\n")
    # The killed run wrote the one in the middle; another command came later.
    (run / CLAIM).write_text(json.dumps({"process": 1, "logs": ["logs/version_1", "../outside", "logs/.."]}))
    (run / "samples_val.jsonl").write_text("of the killed run\n")
    (tmp_path / "outside").mkdir()
    main(stage_args("sft", "fit", run, "--resume"))
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["version_0", "version_2", "version_3"]
    assert (tmp_path / "outside").is_dir()
    assert not (run / "samples_val.jsonl").exists()
