"""Several processes: one is killed, the others end and say which, and the run goes on exactly."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.runs import ENVIRONMENT, differences, left

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[2]
# Who is asked to end, how, with what exit code the run ends, and what it says. `make faults` tries all.
CASES = {
    "a process is killed": (1, signal.SIGKILL, 1, "process 1 of this run (PID "),
    "a process is told to end": (1, signal.SIGTERM, 143, "SIGTERM: the run saves after this iteration and ends"),
    "the first process is killed": (0, signal.SIGKILL, -9, "process 0 of this run (PID "),
}
SOME = dict(list(CASES.items())[: None if os.environ.get("LIT_VAPO_ALL_FAULTS") else 1])


def start(words, log):
    """A run in two processes, which Lightning starts."""
    command, environment = [sys.executable, "-m", "lit_vapo", *words], {**os.environ, **ENVIRONMENT}
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)


@pytest.fixture(scope="module")
def two(world, tmp_path_factory):
    """The words of a run in two processes, and the folder of one that nothing happened to."""
    folder = tmp_path_factory.mktemp("two")

    def words(run):
        return world.words("heads", run, "--resume", trainer__devices=2, trainer__strategy="ddp", data__batch_size=2)

    assert start(words(folder / "run"), folder / "log.txt").wait(300) == 0, (folder / "log.txt").read_text()
    return words, folder / "run"


@pytest.mark.parametrize("case", SOME)
def test_when_one_process_ends_the_run_ends_and_goes_on(two, tmp_path, case):
    words, whole = two
    rank, number, expected, message = CASES[case]
    run, log = tmp_path / "run", tmp_path / "log.txt"
    process = start(words(run), log)
    end = time.monotonic() + 200
    while not (run / "checkpoints" / "iteration=000002.ckpt").exists() and time.monotonic() < end:
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[0]) if rank else process.pid, number)
    assert process.wait(60) == expected, log.read_text()
    # Processes that outlive the first one notice, too.
    while (message not in log.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    assert message in log.read_text()
    assert start(words(run), log).wait(300) == 0, log.read_text()
    assert differences(left(run), left(whole)) == []
