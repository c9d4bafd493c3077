"""Signals end a run with a checkpoint and an exit code that says so; the run goes on exactly."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.runs import ENVIRONMENT, differences, left, once
from helpers import read_jsonl

pytestmark = pytest.mark.faults
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}
# A step that takes long, or for ever.
SLOW = """
import time
from lit_vapo.stages.sft.module import SFTModule
original = SFTModule.training_step
def step(self, batch, batch_idx):
    if self.trainer.global_step == 2:
        open(self.trainer.default_root_dir + "/slow", "w").close()
        time.sleep({seconds})
    return original(self, batch, batch_idx)
SFTModule.training_step = step
"""


@pytest.mark.parametrize("kind", ["sft", "ppo"])
@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_saves_and_ends(server, world, whole, tmp_path, kind, number):
    if kind == "ppo" and number != signal.SIGTERM:
        pytest.skip("one is enough")
    run, log = tmp_path / "run", tmp_path / "log.txt"
    # No checkpoint but the one that the signal asks for.
    words = world.words(kind, run, "--resume", checkpoint__every_iterations="1000")
    metrics = run / "logs" / "version_0" / "metrics.csv"
    code, _ = server.run(words, log, once(metrics.exists, number))
    assert code == CODES[number], log.read_text()
    assert f"{number.name}: the run saves after this iteration and ends" in log.read_text()
    kept = [path.name for path in (run / "checkpoints").iterdir()]
    assert "last.ckpt" in kept
    assert not (run / "finished.json").exists()
    assert not (run / "running.json").exists()
    code, _ = server.run(words, log)
    assert code == 0, log.read_text()
    expected, found = left(whole(kind)[0]), left(run)
    # Fewer were kept, since fewer were asked for.
    assert differences({**found, "files": 0}, {**expected, "files": 0}) == []


def test_a_second_ctrl_c_ends_at_once(server, world, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log.txt"

    def kill(process):
        once((run / "slow").exists, signal.SIGINT)(process)
        time.sleep(0.5)
        os.kill(process, signal.SIGINT)

    code, seconds = server.run(world.words("sft", run), log, kill, before=[SLOW.format(seconds=60)])
    assert code == -signal.SIGINT
    assert seconds < 40
    assert "SIGINT: the run saves after this iteration and ends; once more to end it at once" in log.read_text()


def test_a_run_that_cannot_end_its_iteration_gives_up(server, world, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log.txt"
    words = world.words("sft", run, "--checkpoint.grace_seconds=1")
    code, seconds = server.run(words, log, once((run / "slow").exists, signal.SIGTERM), [SLOW.format(seconds=60)])
    assert code == 143
    assert seconds < 40
    assert "this iteration is not over after 1 seconds (checkpoint.grace_seconds)" in log.read_text()
    # What was saved before stays.
    assert (run / "checkpoints" / "last.ckpt").resolve().name == "iteration=000002.ckpt"


@pytest.fixture
def slurm(tmp_path):
    """A cluster of one machine: commands that note how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": f'echo "{{\\"words\\": \\"$*\\"}}" >>{tmp_path}/scontrol.jsonl',
        "lit-vapo": f'exec {sys.executable} -m lit_vapo "$@"',
    }
    for name, line in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)
    job = {
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NAME": "lit-vapo-train",
        "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_JOB_NODELIST": "localhost",
    }
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    environment = {**os.environ, **ENVIRONMENT, **job, "PATH": path, "PYTHONPATH": str(root)}

    def start(words):
        command = ["bash", str(root / "deploy" / "train.slurm"), *words]
        with (tmp_path / "log.txt").open("a") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    return start


def test_slurm_queues_a_run_again_until_it_is_finished(slurm, world, whole, tmp_path):
    run = tmp_path / "run"
    words = world.words("sft", run, checkpoint__every_iterations="1000")
    job = slurm(words)
    metrics = run / "logs" / "version_0" / "metrics.csv"
    end = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < end:
        time.sleep(0.02)
    # As srun does, which passes a signal on to what it has started.
    pid = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True).stdout.split()[0]
    os.kill(int(pid), signal.SIGUSR1)
    assert job.wait(120) == 138, (tmp_path / "log.txt").read_text()
    assert read_jsonl(tmp_path / "scontrol.jsonl") == [{"words": "requeue 17"}]
    assert slurm(words).wait(120) == 0, (tmp_path / "log.txt").read_text()
    # Neither finished runs nor other failures are queued again.
    assert len(read_jsonl(tmp_path / "scontrol.jsonl")) == 1
    found = {**left(run), "files": 0}
    assert differences(found, {**left(whole("sft")[0]), "files": 0}) == []
