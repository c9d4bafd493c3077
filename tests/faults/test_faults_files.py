"""Disks that fill up, files that are torn, and files that have changed: what stays, what is said, and the exit code."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import helpers
import pytest
import torch
from faults.runs import differences, left

from lit_vapo.models.digests import seal

pytestmark = pytest.mark.faults


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a given size, where this machine lets one be made."""
    made = []

    def make(kilobytes):
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be made here")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(folder):
    """Leave no room."""
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass


# In the process of a run: no room from the third step on, and, if it is told so, room again from the fifth.
FULL = """
import os
from lit_vapo.stages.{stage}.module import {module} as Module
import faults.test_faults_files as files
from pathlib import Path
original = Module.training_step
def step(self, batch, batch_idx):
    disk = Path({disk!r})
    done = self.trainer.fit_loop.epoch_loop.batch_progress.total.completed
    if done == 2:
        files.fill(disk)
    if done == 5 and {again}:
        (disk / "filler").unlink()
    return original(self, batch, batch_idx)
Module.training_step = step
"""
MODULES = {"sft": "SFTModule", "reward": "RewardModule", "ppo": "PPOModule"}


def full(kind, disk, again):
    stage = {"heads": "reward"}.get(kind, kind)
    return [FULL.format(stage=stage, module=MODULES[stage], disk=str(disk), again=again)]


@pytest.mark.parametrize("kind", ["heads", "ppo"])
def test_a_disk_that_is_full_for_a_while_costs_nothing(server, world, whole, small_disk, tmp_path, kind):
    disk, log = small_disk(20_000), tmp_path / "log.txt"
    words = world.words(kind, disk / "run", "--resume")
    code, _ = server.run(words, log, before=full(kind, disk, True))
    said = log.read_text()
    assert code == 0, said
    assert "No space left on device. Not saved; the checkpoints before stay. The run goes on" in said
    # Every row is there, though there was no room for some of them at first. What could not be saved is not the best.
    found, expected = left(disk / "run"), left(whole(kind)[0])
    for each in (found, expected):
        each["files"] = each["best"] = each["last"]["best"] = None
    assert differences(found, expected) == []


def test_a_disk_that_stays_full_keeps_the_last_checkpoint_and_fails(server, world, whole, small_disk, tmp_path):
    disk, log = small_disk(20_000), tmp_path / "log.txt"
    words = world.words("heads", disk / "run", "--resume")
    code, _ = server.run(words, log, before=full("heads", disk, False))
    assert code == 2, log.read_text()
    assert log.read_text().strip().splitlines()[-1].endswith("No space left on device")
    kept = disk / "run" / "checkpoints" / "last.ckpt"
    assert kept.resolve().name == "iteration=000002.ckpt"
    torch.load(kept, weights_only=True)
    assert not list((disk / "run").rglob("*.partial"))
    (disk / "filler").unlink()
    code, _ = server.run(words, log)
    assert code == 0, log.read_text()
    assert differences(left(disk / "run"), left(whole("heads")[0])) == []


def test_a_run_can_be_told_to_end_where_it_cannot_be_saved(server, world, small_disk, tmp_path):
    disk, log = small_disk(20_000), tmp_path / "log.txt"
    words = world.words("heads", disk / "run", "--checkpoint.on_failure=stop")
    code, _ = server.run(words, log, before=full("heads", disk, True))
    assert code == 2
    assert "iteration=000003.ckpt: No space left on device" in log.read_text()


def test_an_export_that_finds_no_room_leaves_nothing(server, whole, small_disk, tmp_path):
    disk, log = small_disk(100), tmp_path / "log.txt"
    run, _ = whole("heads")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    fill(disk)
    words = ["export", f"--checkpoint={run}/checkpoints/last.ckpt", f"--output={disk}/ensemble"]
    code, _ = server.run(words, log)
    assert code == 2, log.read_text()
    assert "No space left on device" in log.read_text()
    assert [path.name for path in disk.iterdir()] == ["filler"]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


# What is torn.


@pytest.fixture
def stopped(server, world, tmp_path):
    """A run that has two checkpoints, and something left to do."""
    run, log = tmp_path / "run", tmp_path / "log.txt"
    code, _ = server.run(world.words("heads", run, trainer__max_epochs="1"), log)
    assert code == 0, log.read_text()
    return run, world.words("heads", run, "--resume")


def test_a_torn_checkpoint_is_named_and_the_one_before_is_taken(server, whole, stopped, tmp_path):
    run, words = stopped
    newest = (run / "checkpoints" / "last.ckpt").resolve()
    os.truncate(newest, newest.stat().st_size // 2)
    code, _ = server.run(words, tmp_path / "log.txt")
    said = (tmp_path / "log.txt").read_text()
    assert code == 0, said
    assert f"got '{newest}', which cannot be read (it is torn or damaged); the one before it is taken" in said
    assert "iteration=000002.ckpt, after iteration 2" in said


def test_a_flipped_bit_in_a_checkpoint_is_noticed(server, stopped, tmp_path):
    run, words = stopped
    newest = (run / "checkpoints" / "last.ckpt").resolve()
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    code, _ = server.run([*words[:-1], f"--ckpt_path={newest}"], tmp_path / "log.txt")
    assert code == 2
    assert "was damaged after it was written" in (tmp_path / "log.txt").read_text()
    code, _ = server.run(words, tmp_path / "log.txt")
    assert code == 0
    assert "after iteration 2" in (tmp_path / "log.txt").read_text()


def test_a_finished_run_has_nothing_left_to_do(server, whole, world, tmp_path):
    run, _ = whole("heads")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, _ = server.run(world.words("heads", run, "--resume"), tmp_path / "log.txt")
    assert code == 0
    assert f"resume: the run in {run} is finished; there is nothing left to do" in (tmp_path / "log.txt").read_text()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_that_is_given_more_epochs_goes_on(server, whole, stopped, tmp_path):
    run, words = stopped
    code, _ = server.run(words, tmp_path / "log.txt")
    assert code == 0, (tmp_path / "log.txt").read_text()
    assert (run / "checkpoints" / "last.ckpt").resolve().name == "iteration=000006.ckpt"


# What has changed.


def more_pairs(world, run):
    with open(world.pairs, "a") as file:
        file.write('{"prompt": "One more", "chosen": " was good", "rejected": " was bad"}\n')


def another_base(world, run):
    helpers.tiny_model(Path(world.model), helpers.tiny_tokenizer(Path(world.model), chat_template=True), seed=1)


def another_template(world, run):
    template = Path(world.model) / "chat_template.jinja"
    template.write_text(template.read_text() + " ")


CHANGES = {
    "data.preferences (train)": more_pairs,
    "model.base.path": another_base,
    "data.tokenizer": another_template,
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_since_the_run_began_is_refused_by_name(server, stopped, world, tmp_path, what):
    run, words = stopped
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.ckpt")}
    kept = tmp_path / "kept"
    shutil.copytree(world.folder, kept)
    try:
        CHANGES[what](world, run)
        code, _ = server.run(words, tmp_path / "log.txt")
    finally:
        shutil.rmtree(world.folder)
        shutil.copytree(kept, world.folder)
    said = (tmp_path / "log.txt").read_text()
    assert code == 2, said
    assert f"error: {what}: expected what the run began with (digest " in said
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.ckpt")} == before


def test_another_ensemble_is_refused_by_name(server, world, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log.txt"
    code, _ = server.run(world.words("ppo", run, trainer__max_epochs="1"), log)
    assert code == 0, log.read_text()
    kept = tmp_path / "kept"
    shutil.copytree(world.ensemble, kept)
    try:
        name = next(path for path in world.ensemble.glob("*.json") if path.name != "digests.json")
        name.write_text(name.read_text() + "\n")
        seal(world.ensemble)
        code, _ = server.run(world.words("ppo", run, "--resume"), log)
    finally:
        shutil.rmtree(world.ensemble)
        shutil.copytree(kept, world.ensemble)
    assert code == 2
    assert "error: model.reward: expected what the run began with (digest " in log.read_text()
