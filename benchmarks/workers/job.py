"""How a benchmark starts a worker; what one of `benchmarks/reward_uq.py` is told and answers; standard library only.

Workers run under different interpreters, which share nothing but this file (and `ppo_job.py`, those of PPO).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class Job:
    """One training to be timed.

    Attributes:
        part: `heads`, heads on a frozen backbone; `adapters`, LoRA members; `whole`, whole models as members, ours
            alone.
        model: Folder of the model and its tokenizer.
        pairs: Preferences, a `.jsonl` with `prompt`, `chosen` and `rejected`.
        work: Empty folder for what the training writes.
        members: K.
        batch_size: Pairs of a step.
        max_length: Most tokens of a sequence.
        epochs: Passes over the pairs.
        rank: Rank of the adapters.
        alpha: Their updates are scaled by alpha / rank.
        targets: Linear layers that are adapted.
        layers: Number of blocks of the model.
        top_layers: Only so many blocks are adapted, the topmost.
        dtype: Of the backbone; what is trained is float32.
        checkpointing: The peer recomputes activations in the backward pass, which is its default with adapters.
        feature_tokens: Tokens of a batch while features are computed.
        threads: Threads of torch.
        learning_rate: Peak learning rate of AdamW; it decays linearly.
        processor_time: Count the seconds that the process computed, not those that passed.
        bootstrap: Ours alone: each member has its own bootstrap of the pairs, and reads no others.
    """

    part: str
    model: str
    pairs: str
    work: str
    members: int
    batch_size: int
    max_length: int
    epochs: int
    rank: int
    alpha: float
    targets: list[str]
    layers: int
    top_layers: int
    dtype: str
    checkpointing: bool
    feature_tokens: int
    threads: int
    learning_rate: float
    processor_time: bool
    bootstrap: bool = False

    def now(self) -> float:
        """The clock's seconds."""
        return time.process_time() if self.processor_time else time.perf_counter()


@dataclass
class Answer:
    """What a training took.

    Attributes:
        train: Seconds from before the first step to after the last; for `heads`, from cached features.
        whole: Seconds of the first epoch, features included, for `heads`; as `train` for `adapters`.
        rest: Seconds of reading, tokenising and loading the model.
        steps: Optimiser steps of each training.
        peak_mb: Most memory that was resident in the process, in 10⁶ bytes.
    """

    train: float
    whole: float
    rest: float
    steps: int
    peak_mb: float = 0.0


def start(python: str, worker: str, job: Any, folder: Path, threads: int) -> dict[str, Any]:
    """Run a worker in a process of its own.

    Args:
        python: Its interpreter.
        worker: Its file, beside this one.
        job: What it is told, a dataclass.
        folder: Where question and answer are written.
        threads: Threads of torch.

    Returns:
        What it answered.
    """
    told, answer = folder / "job.json", folder / "answer.json"
    told.write_text(json.dumps(asdict(job)))
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    offline = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    environment = {**os.environ, **limits, **offline}
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
    command = [python, str(Path(__file__).parent / worker), str(told), str(answer)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def serve(work: Callable[[Job], Answer]) -> None:
    """Read the job that the first argument names, do it, and write the answer where the second says."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    answer = work(job)
    answer.peak_mb = peak_bytes() / 1e6
    Path(sys.argv[2]).write_text(json.dumps(asdict(answer)))


def peak_bytes() -> int:
    """Most memory that was resident in this process."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Here and not from getrusage, which counts in what the parent held when it started this process.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
