"""What a worker of `benchmarks/trl_ppo.py` or `ppo_speed.py` is told and what it answers; standard library, torch only.

The workers run under different interpreters, which share nothing but this file and `job.py`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from job import peak_bytes


@dataclass
class Job:
    """One run of PPO.

    Attributes:
        policy: Folder of the policy to start from, with its tokenizer.
        ensemble: Folder of the reward model, as ours.
        classifier: Folder of the same reward model, as a sequence classifier.
        prompts: A `.jsonl` with `prompt`.
        output: Folder for the policies, one for each iteration in `saved`.
        saved: Iterations after which the policy is saved.
        iterations: Rollouts, each followed by `epochs` times `minibatches` weight updates.
        batch_size: Responses of a rollout.
        max_prompt_length: Most tokens of a prompt.
        response_length: Most tokens of a response.
        epochs: Passes over a rollout.
        minibatches: Weight updates of a pass.
        learning_rate: Of policy and critic; AdamW, falls linearly by iteration.
        kl_coef: β.
        critic: Ours alone: `own`, a model of its own as the peer's, or `reference`.
        lora_rank: Rank of the adapters that train; `None` trains all weights.
        ema_decay: Ours alone: the policies that are saved are averaged with this decay; `None` for those that sample.
        seed: Seed of the run.
        objective: Ours alone, by class name.
        dtype: Of frozen weights; what is trained is float32.
        processes: Ours alone: so many train together, each with a batch of its own.
        advantage: `gae`, with a critic; `rloo` or `grpo`, with several responses to each prompt.
        responses: Responses to each prompt.
    """

    policy: str
    ensemble: str
    classifier: str
    prompts: str
    output: str
    saved: list[int]
    iterations: int
    batch_size: int
    max_prompt_length: int
    response_length: int
    epochs: int
    minibatches: int
    learning_rate: float
    kl_coef: float
    critic: str = "own"
    lora_rank: int | None = None
    ema_decay: float | None = None
    seed: int = 0
    objective: str = "SingleReward"
    dtype: str = "float32"
    processes: int = 1
    advantage: str = "gae"
    responses: int = 1


@dataclass
class Answer:
    """What a run took.

    Attributes:
        seconds: Processor time of each iteration; saving is left out.
        elapsed: Seconds that passed in each iteration.
        updates: How often the policy's weights changed.
        base_mb: Memory resident before any model was loaded, in 10⁶ bytes.
        peak_mb: Most memory that was resident.
        rewards: Mean reward of each rollout.
        phases: Ours alone: seconds of each iteration that passed in sampling, scoring and updating, by name.
        tokens: Ours alone: tokens of the responses of each iteration.
    """

    seconds: list[float] = field(default_factory=list)
    elapsed: list[float] = field(default_factory=list)
    updates: int = 0
    base_mb: float = 0.0
    peak_mb: float = 0.0
    rewards: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    tokens: list[float] = field(default_factory=list)


class Stopwatch:
    """Times iterations, counts true weight updates, and saves the policy now and then.

    Args:
        job: The run.
        answer: Where times and counts go.
    """

    def __init__(self, job: Job, answer: Answer) -> None:
        self.job = job
        self.answer = answer

    def watch(self, optimizer: torch.optim.Optimizer, policy: torch.nn.Module) -> None:
        """Start the clock, and look at a weight of the policy after each step that the optimiser takes."""
        weight = max((p for p in policy.parameters() if p.requires_grad), key=torch.numel)
        last = [float(weight.detach().double().sum())]

        def changed(*args: Any) -> None:
            now = float(weight.detach().double().sum())
            self.answer.updates += now != last[0]
            last[0] = now

        optimizer.register_step_post_hook(changed)
        self._start()

    def _start(self) -> None:
        self.started, self.passed = time.process_time(), time.perf_counter()

    def lap(self, policy: Any, reward: float) -> None:
        """An iteration is done."""
        self.answer.seconds.append(time.process_time() - self.started)
        self.answer.elapsed.append(time.perf_counter() - self.passed)
        self.answer.rewards.append(reward)
        done = len(self.answer.seconds)
        if done in self.job.saved:
            policy.save_pretrained(str(Path(self.job.output) / str(done)))
        self._start()


def serve(work: Callable[[Job, Answer], None]) -> None:
    """Read the job that the first argument names, do it, and write the answer where the second says."""
    torch.set_num_threads(1)
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    answer = Answer(base_mb=peak_bytes() / 1e6)
    work(job, answer)
    answer.peak_mb = peak_bytes() / 1e6
    if int(os.environ.get("LOCAL_RANK", 0)):
        return
    Path(sys.argv[2]).write_text(json.dumps(asdict(answer)))
