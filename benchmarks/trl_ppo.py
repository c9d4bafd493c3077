"""PPO against TRL 1.12.0's: gold reward at equal KL, time of an iteration, memory.

    python -m venv peer && peer/bin/pip install -c constraints-cpu.txt trl==1.12.0 peft
    python benchmarks/trl_ppo.py --peer_python peer/bin/python

A small Llama learns a made-up language. Words belong to topics, topics have a worth, and the gold reward of a response
is the mean worth of its words. For each seed a linear reward head learns from few preferences, whose labels are drawn
from the gold reward's odds: it errs, and PPO against it overshoots. Both sides start from the same policy, maximise the
same head less β·KL (TRL reads it as a sequence classifier, up to the same token), and their policies are judged by the
same code on the same held-out prompts: gold, and the KL of whole responses.

Equal on both sides: policy, reward model, critic (a model of its own that starts from the reward model), prompts,
batch, lengths, temperature, β, clipping, γ, λ, whitening, AdamW and its linear decay, one learning rate for policy and
critic, data type, one thread, and the number of times the weights change, which is counted. TRL's `num_mini_batches`
works only without gradient accumulation, so it runs without. TRL does not clip gradients, so we do not either.

Not equal: TRL puts the reward one place after the token that ends a response, and its critic learns the value of that
place. Of the sides below, some are ours as we ship it: adapters in place of all weights, a critic on the reference's
hidden states with a learning rate of its own, and the average of the policy's weights. The others leave out one or all
of that, and one gives adapters to TRL. Some have another learning rate, and some take more iterations, since theirs are
shorter: as many as fit into the processor time of TRL's.

Every run has a process of its own; the sides alternate, and ratios are taken pair by pair. Times are processor times of
whole iterations. Runs that are in `work` already are not repeated.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from matplotlib.figure import Figure
from scipy import stats

WORKERS = Path(__file__).parent / "workers"
sys.path.insert(0, str(WORKERS))

from job import start  # noqa: E402
from ppo_job import Answer, Job  # noqa: E402
from ppo_task import PROMPT, RESPONSE, Judge, Judged, Language, make_policy, make_reward, texts, write_rows  # noqa: E402

from lit_vapo.figures.drawing import BLUE, GREY, ORANGE  # noqa: E402
from lit_vapo.folders import claim_folder, new_folder, write_whole  # noqa: E402
from lit_vapo.models.weights import quiet  # noqa: E402
from lit_vapo.study.experiment import Record  # noqa: E402

# Prompts for runs that are so many times as long.
MOST = 2
SHARES = [1 / 24, 2 / 24, 4 / 24, 7 / 24, 11 / 24, 17 / 24, 1.0]


@dataclass(frozen=True)
class Side:
    """One way to run PPO.

    Args:
        label: What tables call it.
        worker: The script that runs it.
        rate: Learning rate, in multiples of the benchmark's.
        critic: Ours alone.
        lora_rank: Rank of the adapters that train; all weights train without.
        ema_decay: Ours alone.
        longer: Iterations, in multiples of the benchmark's.
    """

    label: str
    worker: str = "ppo_ours.py"
    rate: float = 1.0
    critic: str = "reference"
    lora_rank: int | None = None
    ema_decay: float | None = None
    longer: float = 1.0


SIDES = {
    "trl": Side("TRL 1.12.0", "ppo_trl.py"),
    "trl_slow": Side("TRL, a third of the rate", "ppo_trl.py", rate=1 / 3),
    "trl_fast": Side("TRL, three times the rate", "ppo_trl.py", rate=3),
    "trl_lora": Side("TRL, adapters", "ppo_trl.py", rate=10 / 3, lora_rank=16),
    "own": Side("ours, all weights, a critic of its own as TRL's", critic="own"),
    "raw": Side("ours, all weights, not averaged"),
    "raw_slow": Side("ours, all weights, not averaged, a third of the rate", rate=1 / 3),
    "lora_raw": Side("ours, not averaged", rate=10 / 3, lora_rank=16),
    "default": Side("ours", rate=10 / 3, lora_rank=16, ema_decay=0.9),
    "default_long": Side("ours, half the rate, in TRL's time", rate=5 / 3, lora_rank=16, ema_decay=0.9, longer=1.75),
}


# How they are drawn; of those with a whole line, every run.
LINES = {
    "raw": (GREY, "-"),
    "trl": (ORANGE, "-"),
    "trl_slow": (ORANGE, "--"),
    "default": (BLUE, "-"),
    "default_long": (BLUE, "--"),
}


def run(python: str, worker: str, job: Job) -> Answer:
    """One run in a process of its own, unless it is there already."""
    output = Path(job.output)
    answer = output / "answer.json"
    if answer.is_file():
        return Answer(**json.loads(answer.read_text()))
    shutil.rmtree(output, ignore_errors=True)  # of a run that was killed
    output.mkdir(parents=True)
    return Answer(**start(python, worker, job, output, threads=1))


def judged(judge: Judge, job: Job, side: str, start: Judged) -> Record:
    """Gold and KL of every saved policy of a run."""
    kept = Path(job.output) / "judged.json"
    if not kept.is_file():
        write_whole(kept, json.dumps([judge(Path(job.output) / str(i)) for i in job.saved]))
    points = [Judged(*x) for x in json.loads(kept.read_text())]
    kl, gold, lengths = [p.k1 for p in points], [p.gold for p in points], [p.length for p in points]
    further = {"k3": points[-1].k3, "length": lengths[-1]}
    return Record(side, "", job.seed, job.seed, kl, gold, start.gold, further)


def compare(records: dict[str, list[Record]], targets: list[float]) -> None:
    """Gain in gold at equal KL: mean ± standard deviation over seeds, and pairs with the peer's, as it is and at best.

    The peer's best is, for each KL, the side of its own with the largest mean that half of its runs arrive at.
    """
    peers = [side for side in records if SIDES[side].worker == "ppo_trl.py" and SIDES[side].lora_rank is None]
    for kl in targets:
        gains = {side: np.array([r.gain_at(kl) for r in runs], dtype=float) for side, runs in records.items()}
        best = max(
            (side for side in peers if np.isnan(gains[side]).mean() <= 0.5),
            key=lambda side: np.nanmean(gains[side]),
            default=None,
        )
        print(f"gain in gold at {kl:g} nats" + (f" (the peer's best: {SIDES[best].label})" if best else ""))
        for side, gain in gains.items():
            there = gain[~np.isnan(gain)]
            shown = f"  {SIDES[side].label:52} {len(there)} of {len(gain)} runs arrive"
            if len(there) > 1:
                shown += f", {there.mean():.3f} ± {there.std(ddof=1):.3f}"
            for peer in dict.fromkeys(("trl", best)):
                if side not in peers and peer in gains:
                    shown += "; " + _pairs(gain, gains[peer], SIDES[peer].label)
            print(shown, flush=True)


def _pairs(ours: np.ndarray, theirs: np.ndarray, label: str) -> str:
    """Ours over theirs, and less theirs, by the seeds in which both arrive."""
    count = min(len(ours), len(theirs))
    there = ~np.isnan(ours[:count]) & ~np.isnan(theirs[:count])
    if there.sum() < 2:
        return f"too few pairs with {label}"
    a, b = ours[:count][there], theirs[:count][there]
    low, high = stats.ttest_rel(a, b).confidence_interval()
    return (
        f"{a.mean() / b.mean():.2f} times {label}'s, {(a - b).mean():+.3f} ({low:+.3f} … {high:+.3f}; {len(a)} pairs)"
    )


def cost(answers: dict[str, list[Answer]]) -> None:
    """Median time of an iteration and memory, and the peer's over ours, run by run."""
    quantities: dict[str, Callable[[Answer], float]] = {
        "s an iteration": lambda a: statistics.median(a.seconds),
        "MB": lambda a: a.peak_mb,
        "MB above what the imports take": lambda a: a.peak_mb - a.base_mb,
    }
    for side, runs in answers.items():
        print(SIDES[side].label)
        for unit, quantity in quantities.items():
            shown = f"  {statistics.median(map(quantity, runs)):.3g} {unit}"
            if side != "trl" and "trl" in answers:
                ratios = [quantity(b) / quantity(a) for a, b in zip(runs, answers["trl"], strict=True)]
                shown += f"; TRL {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) times as much"
            print(shown, flush=True)


def draw(records: dict[str, list[Record]], path: Path) -> None:
    """Gain in gold against KL: runs, and the mean over seeds at each saved iteration."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for side, (colour, style) in LINES.items():
        runs = records.get(side, [])
        if not runs:
            continue
        points = np.array(
            [[(0.0, 0.0), *zip(r.kl, np.array(r.true_return) - r.reference_return, strict=True)] for r in runs]
        )
        if style == "-":
            for one in points:
                axes.plot(*one.T, color=colour, alpha=0.2, linewidth=1)
        shown: dict[str, Any] = {"color": colour, "linestyle": style, "linewidth": 2, "marker": "o", "markersize": 4}
        axes.plot(*points.mean(0).T, label=SIDES[side].label, **shown)
    axes.set_xlabel("KL(π‖π₀) of whole responses, nats (k1)")
    axes.set_ylabel("gain in gold reward over the reference")
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
    targets: list[float] = [0.5, 1.0, 2.0, 3.0],  # noqa: B006
    sides: list[str] = list(SIDES),  # noqa: B006
) -> None:
    """Print the tables and draw the curves.

    Args:
        peer_python: Interpreter of an environment with TRL; `null` leaves the peer out.
        work: Folder for models, runs and `gold_kl.png`; what is there is used again, and that of other options refused.
        seeds: Repetitions; `null` for 10 with the peer and 1 without.
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
        sides: Which to run; those of the peer are left out without one.
    """
    quiet()
    torch.set_num_threads(1)
    root, language = Path(work), Language()
    root.mkdir(parents=True, exist_ok=True)
    shape = (iterations, batch_size, PROMPT, RESPONSE, epochs, minibatches, learning_rate, kl_coef)
    claim_folder(
        root, "--work", {"shape": list(shape), "pairs": pairs, "held_out": held_out, "pretraining": pretraining}
    )
    policy = root / "policy"
    if not policy.is_dir():
        with new_folder(policy, "--work") as partial:
            make_policy(partial, language, pretraining)
    ids = language.write(MOST * iterations * batch_size, PROMPT, torch.Generator().manual_seed(5))
    prompts = write_rows(root / "prompts.jsonl", [{"prompt": text} for text in texts(ids)])
    judge = Judge(policy, language, held_out)
    begin = judge(policy)
    print(f"the policy to start from: gold {begin.gold:.3f}, {begin.length:.1f} tokens a response", flush=True)
    answers: dict[str, list[Answer]] = {}
    records: dict[str, list[Record]] = {}
    for seed in range(seeds or (10 if peer_python else 1)):
        reward = root / f"reward_{seed}"
        if not reward.is_dir():
            with new_folder(reward, "--work") as partial:
                make_reward(partial, policy, language, pairs, seed)
        job = Job(str(policy), f"{reward}/ensemble", f"{reward}/classifier", prompts, "", [], *shape, seed=seed)
        for side in sides[:: -1 if seed % 2 else 1]:
            about = SIDES[side]
            python = peer_python if about.worker == "ppo_trl.py" else sys.executable
            if python is None:
                continue
            count = round(iterations * about.longer)
            one = replace(
                job,
                output=f"{root}/{side}_{seed}",
                saved=sorted({max(1, round(share * count)) for share in SHARES}),
                iterations=count,
                learning_rate=learning_rate * about.rate,
                critic=about.critic,
                lora_rank=about.lora_rank,
                ema_decay=about.ema_decay,
            )
            answer = run(python, about.worker, one)
            if answer.updates != count * epochs * minibatches:
                raise SystemExit(f"{about.label}: {count * epochs * minibatches} weight updates, got {answer.updates}")
            record = judged(judge, one, side, begin)
            answers.setdefault(side, []).append(answer)
            records.setdefault(side, []).append(record)
            print(
                f"seed {seed}, {about.label}: reward {answer.rewards[0]:.2f} to {answer.rewards[-1]:.2f}, gain in gold "
                f"{record.gain:.3f} at {record.kl[-1]:.2f} nats (k3 {record.extra['k3']:.2f}), "
                f"{record.extra['length']:.1f} tokens",
                flush=True,
            )
    compare(records, targets)
    cost(answers)
    draw(records, root / "gold_kl.png")
    if peer_python is None:
        print("The peer was left out: --peer_python wants the interpreter of an environment with TRL.")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
