"""Commands in processes of their own, and what they leave."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

SERVER = Path(__file__).with_name("server.py")
ROOT = SERVER.parents[2]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


class Server:
    """Starts commands one after another."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **ENVIRONMENT,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
            },
        )
        assert self.process.stdout.readline() == "ready\n"

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()

    def run(self, words, log, kill=None, before=(), **environment):
        """Run a command to its end, and kill it on the way if `kill` says when; its exit code and its seconds.

        Args:
            words: The command line.
            log: File of what it prints.
            kill: Called with the number of the process in a thread beside it.
            before: Statements that the process executes first.
            environment: Variables of the process.
        """
        command = {"words": words, "log": str(log), "environment": environment, "before": list(before)}
        started = time.monotonic()
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        number = int(self.process.stdout.readline())
        watch = None
        if kill is not None:
            watch = threading.Thread(target=kill, args=(number,), daemon=True)
            watch.start()
        code = int(self.process.stdout.readline())
        return code, time.monotonic() - started


def after(seconds, number=signal.SIGKILL):
    """Kills a process after some seconds."""

    def kill(process):
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)

    return kill


def once(condition, number, seconds=60):
    """Sends a signal as soon as something is so."""

    def kill(process):
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(process, number)

    return kill


# What is measured by the clock differs from run to run.
CLOCK = ("per_second",)


def rows(path):
    """A table without what the clock says."""
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.endswith(CLOCK)} for row in csv.DictReader(file)]


def left(folder):
    """What a run left, in a form that can be compared."""
    folder = Path(folder)
    found = {"files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if "features" not in str(p))}
    for path in sorted(folder.glob("logs/*/metrics.csv")) + sorted(folder.glob("evaluations.csv")):
        found[str(path.relative_to(folder))] = rows(path)
    for path in folder.glob("samples_val.jsonl"):
        found[path.name] = path.read_text()
    for name in ("last", "best"):
        path = folder / "checkpoints" / f"{name}.ckpt"
        if path.exists():
            saved = torch.load(path, weights_only=True)
            state = saved["callbacks"]["RunCheckpoint"]
            found[name] = {
                "file": path.resolve().name,
                **{k: saved[k] for k in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")},
                **{k: state[k] for k in ("best", "random", "files")},
            }
    return found


def differences(one, other, where=""):
    """The places at which two such things differ; tensors bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{where}/{key}: only one has it" for key in one.keys() ^ other.keys()]
        return found + [
            x for key in one.keys() & other.keys() for x in differences(one[key], other[key], f"{where}/{key}")
        ]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} entries"]
        return [x for i, pair in enumerate(zip(one, other, strict=True)) for x in differences(*pair, f"{where}[{i}]")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.shape == other.shape and torch.equal(one, other)
    else:
        same = one == other or (one != one and other != other)
    return [] if same else [f"{where}: {str(one)[:80]} and {str(other)[:80]}"]
