"""PPO against TRL 1.12.0's: gold reward at equal KL, time of an iteration, memory.

    python -m venv peer && peer/bin/pip install -c constraints-cpu.txt trl==1.12.0
    python benchmarks/trl_ppo.py --peer_python peer/bin/python

A small Llama learns a made-up language. Words belong to topics, topics have a worth, and the gold reward of a response
is the mean worth of its words. For each seed a linear reward head learns from few preferences, whose labels are drawn
from the gold reward's odds: it errs, and PPO against it overshoots. Both sides start from the same policy, maximise
the same head (TRL reads it as a sequence classifier) less β·KL, and their policies are judged by the same code on the
same held-out prompts: gold, and the KL of whole responses.

Equal on both sides: policy, reward model, critic (a model of its own that starts from the reward model), prompts,
batch, lengths, temperature, β, clipping, γ, λ, whitening, AdamW and its linear decay, one learning rate for policy and
critic, data type, one thread, and the number of times the weights change, which is counted. TRL's `num_mini_batches`
works only without gradient accumulation, so it runs without. TRL does not clip gradients, so we do not either.

Not equal: TRL puts the reward one place after the token that ends a response, and its critic learns the value of that
place. A third run is ours with our own default, a critic on the reference's hidden states.

Every run has a process of its own; ours and TRL's alternate, and ratios are taken pair by pair. Times are processor
times of whole iterations. Runs that are in `work` already are not repeated.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from matplotlib.figure import Figure
from scipy import stats

WORKERS = Path(__file__).parent / "workers"
sys.path.insert(0, str(WORKERS))

from ppo_job import Answer, Job  # noqa: E402
from ppo_task import PROMPT, RESPONSE, Judge, Judged, Language, make_policy, make_reward, texts, write_rows  # noqa: E402

from lit_vapo.models.pretrained import quiet  # noqa: E402

SAVED = [1, 2, 4, 7, 11, 17, 24]
SIDES = {"ours": "ours", "trl": "TRL 1.12.0", "default": "ours, critic on the reference"}
COLOURS = {"ours": "#0072B2", "trl": "#D55E00", "default": "#8a8f98"}


def run(python: str, worker: str, job: Job) -> Answer:
    """One run in a process of its own, unless it is there already."""
    output = Path(job.output)
    told, answer = output / "job.json", output / "answer.json"
    if not answer.is_file():
        output.mkdir(parents=True, exist_ok=True)
        told.write_text(json.dumps(asdict(job)))
        quietly = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        environment = {**os.environ, **quietly}
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)
        command = [python, str(WORKERS / worker), str(told), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return Answer(**json.loads(answer.read_text()))


Curve = list[Judged]


def judged(judge: Judge, job: Job, start: Judged) -> Curve:
    """Every saved policy of a run, from the one it started with."""
    kept = Path(job.output) / "judged.json"
    if not kept.is_file():
        kept.write_text(json.dumps([judge(Path(job.output) / str(i)) for i in job.saved]))
    return [start, *(Judged(*x) for x in json.loads(kept.read_text()))]


def gold_at(curve: Curve, kl: float) -> float:
    """Gold where a run first reaches this KL, between two of its saved policies; NaN if it never does."""
    for one, two in itertools.pairwise(curve):
        if one.k1 < kl <= two.k1:
            return one.gold + (two.gold - one.gold) * (kl - one.k1) / (two.k1 - one.k1)
    return float("nan")


def interval(differences: np.ndarray) -> str:
    """Mean with its 95% interval, by Student's t."""
    mean = differences.mean()
    half = stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def table(curves: dict[str, list[Curve]], targets: list[float]) -> None:
    """Gold at equal KL: mean ± standard deviation over seeds, and paired differences to the peer's."""
    for kl in targets:
        gold = {side: np.array([gold_at(curve, kl) for curve in runs]) for side, runs in curves.items()}
        cells = [f"{SIDES[side]} {x.mean():.3f} ± {x.std(ddof=1) if len(x) > 1 else 0:.3f}" for side, x in gold.items()]
        if "trl" in gold and len(gold["trl"]) > 1:
            cells += [f"{side} − trl {interval(gold[side] - gold['trl'])}" for side in gold if side != "trl"]
        print(f"gold at {kl:g} nats: " + "; ".join(cells), flush=True)


def cost(answers: dict[str, list[Answer]]) -> None:
    """Median time of an iteration, memory, and the peer's over ours, run by run."""
    for side, runs in answers.items():
        seconds = [statistics.median(a.seconds) for a in runs]
        memory = [a.peak_mb - a.base_mb for a in runs]
        shown = f"{SIDES[side]}: {statistics.median(seconds):.2f} s an iteration, "
        shown += (
            f"{statistics.median(memory):.0f} MB over imports ({statistics.median(a.base_mb for a in runs):.0f} MB)"
        )
        if "trl" in answers and side != "trl":
            peer = answers["trl"]
            times = [statistics.median(b.seconds) / x for b, x in zip(peer, seconds, strict=True)]
            sizes = [(b.peak_mb - b.base_mb) / x for b, x in zip(peer, memory, strict=True)]
            shown += f"; TRL takes {statistics.median(times):.2f} ({min(times):.2f}–{max(times):.2f}) times as long"
            shown += f" and {statistics.median(sizes):.2f} ({min(sizes):.2f}–{max(sizes):.2f}) times the memory"
        print(shown, flush=True)


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    """Gold against KL, every run and the mean over seeds at each saved iteration."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for side, runs in curves.items():
        values = np.array([[(p.k1, p.gold) for p in curve] for curve in runs])
        for run_ in values:
            axes.plot(*run_.T, color=COLOURS[side], alpha=0.25, linewidth=1)
        axes.plot(*values.mean(0).T, color=COLOURS[side], linewidth=2, marker="o", markersize=4, label=SIDES[side])
    axes.set_xlabel("KL(π‖π₀) of whole responses, nats (k1)")
    axes.set_ylabel("gold reward")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(
    peer_python: str | None = None,
    work: str = "runs/trl_ppo",
    seeds: int | None = None,
    iterations: int = 24,
    batch_size: int = 32,
    epochs: int = 4,
    minibatches: int = 2,
    learning_rate: float = 3e-4,
    kl_coef: float = 0.05,
    pairs: int = 150,
    held_out: int = 512,
    pretraining: int = 300,
    targets: list[float] = [1.0, 2.0, 4.0, 6.0, 8.0],  # noqa: B006
) -> None:
    """Print the tables and draw the curves.

    Args:
        peer_python: Interpreter of an environment with TRL; `null` leaves the peer out.
        work: Folder for models, runs and `gold_kl.png`; what is there is used again.
        seeds: Repetitions; `null` for 5 with the peer and 1 without.
        iterations: Rollouts of a run.
        batch_size: Responses of a rollout.
        epochs: Passes over a rollout.
        minibatches: Weight updates of a pass.
        learning_rate: Of policy and critic.
        kl_coef: β.
        pairs: Preferences that a reward model learns from.
        held_out: Prompts of the judge.
        pretraining: Steps that teach the policy the language.
        targets: KLs to compare at, nats.
    """
    quiet()
    torch.set_num_threads(1)
    root, language = Path(work), Language()
    root.mkdir(parents=True, exist_ok=True)
    policy = root / "policy"
    if not policy.is_dir():
        make_policy(policy, language, pretraining)
    count = batch_size * iterations
    ids = language.write(count, PROMPT, torch.Generator().manual_seed(5))
    prompts = write_rows(root / "prompts.jsonl", [{"prompt": text} for text in texts(ids)])
    judge = Judge(policy, language, held_out)
    start = judge(policy)
    print(f"the policy to start from: gold {start.gold:.3f}, {start.length:.1f} tokens a response", flush=True)
    answers: dict[str, list[Answer]] = {}
    curves: dict[str, list[Curve]] = {}
    for seed in range(seeds or (5 if peer_python else 1)):
        reward = root / f"reward_{seed}"
        if not (reward / "classifier").is_dir():
            make_reward(reward, policy, language, pairs, seed)
        shape = (iterations, batch_size, PROMPT, RESPONSE, epochs, minibatches, learning_rate, kl_coef)
        saved = [i for i in SAVED if i <= iterations]
        job = Job(str(policy), f"{reward}/ensemble", f"{reward}/classifier", prompts, "", saved, *shape, seed=seed)
        jobs = {
            "ours": (sys.executable, "ppo_ours.py", replace(job, critic="own")),
            "trl": (peer_python, "ppo_trl.py", job),
            "default": (sys.executable, "ppo_ours.py", replace(job, critic="reference")),
        }
        for side in list(jobs)[:: -1 if seed % 2 else 1]:
            python, worker, one = jobs[side]
            if python is None:
                continue
            one = replace(one, output=f"{root}/{side}_{seed}")
            answer = run(python, worker, one)
            if answer.updates != iterations * epochs * minibatches:
                raise SystemExit(f"{side}: expected {iterations * epochs * minibatches} updates, got {answer.updates}")
            answers.setdefault(side, []).append(answer)
            curves.setdefault(side, []).append(judged(judge, one, start))
            end = curves[side][-1][-1]
            print(
                f"seed {seed}, {SIDES[side]}: reward {answer.rewards[0]:.2f} to {answer.rewards[-1]:.2f}, "
                f"gold {end.gold:.3f} at k1 {end.k1:.2f}, k3 {end.k3:.2f}, {end.length:.1f} tokens",
                flush=True,
            )
    table(curves, targets)
    cost(answers)
    draw(curves, root / "gold_kl.png")
    if peer_python is None:
        print("The peer was left out: --peer_python wants the interpreter of an environment with TRL.")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
