"""Which objective? The demo's task with few and noisy preferences: every objective at the same KL, over several seeds.

Each seed draws its own pairs from the demo's, swaps the sides of some, and trains its own ensemble. All objectives
then start from the same policy and see the same prompts. At equal β objectives travel at different speeds, so gold is
read off each run at given KLs to the reference: every iteration answers prompts it has not met before, and its mean
gold and KL are a point of the run's curve.

    python -m examples.sentiment.prepare --output runs/demo
    python -m examples.sentiment.objectives --demo runs/demo --output runs/objectives

A run whose metrics are there is not repeated: start again after a stop.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli

from examples.sentiment.figures import curves_at_kl, trained_metrics
from lit_vapo.study.statistics import mean_interval

CONFIGS = Path(__file__).parents[2] / "configs"
# The demo's own objective, and the configs that replace it.
OBJECTIVES = {
    "VarianceAware": "ppo/demo.yaml",
    "MeanReward": "objective/mean_reward.yaml",
    "SingleReward": "objective/single_reward.yaml",
    "WorstCase": "objective/worst_case.yaml",
    "UncertaintyWeighted": "objective/uncertainty_weighted.yaml",
}
LEVELS = (1.0, 2.0, 3.0, 4.0, 5.0)
BASELINE = "SingleReward"


def run(words: list[str], folder: Path, threads: int) -> None:
    """Run `lit-vapo` with these words; what it prints goes to a file of the folder.

    Raises:
        RuntimeError: It failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (folder / "log.txt").open("a") as log:
        command = [sys.executable, "-m", "lit_vapo", *words]
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"lit-vapo {words[0]} {words[1]} ended with {done.returncode}: see {folder / 'log.txt'}")


def noisy_pairs(source: Path, target: Path, count: int, flipped: float, seed: int) -> None:
    """Draw pairs without repetition, and swap the sides of a share of them."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rng = random.Random(seed)
    drawn = rng.sample(rows, count)
    for row in drawn[: round(flipped * count)]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    rng.shuffle(drawn)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row) + "\n" for row in drawn))


def data_options(demo: Path) -> list[str]:
    """Where the demo's data lie, as options."""
    files = {"prompts": "train", "prompts_validation": "val", "prompts_test": "test"}
    return [
        f"--data.tokenizer={demo / 'policy-base'}",
        *(f"--data.{name}={demo / 'data' / f'prompts_{part}.jsonl'}" for name, part in files.items()),
    ]


def train_ensemble(demo: Path, folder: Path, pairs: int, flipped: float, seed: int, threads: int) -> Path:
    """The ensemble of a seed, exported."""
    ensemble = folder / "ensemble"
    if ensemble.is_dir():
        return ensemble
    preferences = folder / "preferences.jsonl"
    noisy_pairs(demo / "data" / "preferences.jsonl", preferences, pairs, flipped, seed)
    words = [
        f"--config={CONFIGS / 'reward' / 'demo.yaml'}",
        f"--trainer.default_root_dir={folder / 'reward'}",
        *data_options(demo),
        f"--data.preferences={preferences}",
        f"--data.seed={seed}",
        f"--model.base.path={demo / 'policy-base'}",
        f"--model.reference.path={demo / 'policy-base'}",
        f"--model.head.init_args.seed={seed}",
        f"--seed_everything={seed}",
        "--trainer.enable_progress_bar=false",
    ]
    run(["reward", "fit", *words, "--overwrite=true"], folder / "reward", threads)
    checkpoint = folder / "reward" / "checkpoints" / "last.ckpt"
    run(["reward", "test", *words, f"--ckpt_path={checkpoint}"], folder / "reward", threads)
    run(["export", f"--checkpoint={checkpoint}", f"--output={ensemble}"], folder / "reward", threads)
    return ensemble


def align(
    demo: Path, folder: Path, ensemble: Path, objective: str, seed: int, options: list[str], threads: int
) -> None:
    """One run of PPO, unless it is there."""
    if (folder / "finished.json").is_file():
        return
    words = [
        f"--config={CONFIGS / 'ppo' / 'demo.yaml'}",
        f"--config={CONFIGS / OBJECTIVES[objective]}",
        f"--trainer.default_root_dir={folder}",
        *data_options(demo),
        f"--model.base.path={demo / 'policy-base'}",
        f"--model.reward={ensemble}",
        f"--model.gold.init_args.path={demo / 'judge'}",
        f"--data.seed={seed}",
        f"--seed_everything={seed}",
        "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false",
        "--overwrite=true",
        *options,
    ]
    run(["ppo", "fit", *words], folder, threads)


def at_kl(kl: np.ndarray, value: np.ndarray, levels: tuple[float, ...] = LEVELS) -> np.ndarray:
    """The value at each KL: a straight line fitted to the points around it, near ones counting more.

    Points weigh by a Gaussian of 0.8 nats; NaN beyond the largest KL of the smoothed run.
    """
    out = np.full(len(levels), np.nan)
    reached = np.convolve(kl, np.ones(3) / 3, mode="valid").max()
    for i, level in enumerate(levels):
        weight = np.exp(-0.5 * ((kl - level) / 0.8) ** 2)
        if level <= reached and (weight > 0.1).sum() >= 3:
            design = np.stack([np.ones_like(kl), kl - level], axis=1) * np.sqrt(weight)[:, None]
            out[i] = np.linalg.lstsq(design, value * np.sqrt(weight), rcond=None)[0][0]
    return out


def table(gold: dict[str, np.ndarray]) -> str:
    """Gold at each KL, mean ± standard deviation over seeds, and the paired difference to the baseline (95% t)."""
    head = ["objective", *(f"{level:g} nats" for level in LEVELS), f"less `{BASELINE}`, mean of levels (95%)"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for name, runs in gold.items():
        cells = []
        for column in runs.T:
            known = column[~np.isnan(column)]
            few = "" if len(known) == len(column) else f" ({len(known)} seeds)"
            cells.append(f"{known.mean():.3f} ± {known.std(ddof=1):.3f}{few}" if len(known) > 1 else "–")
        # Levels that one of the two runs did not reach say nothing about their difference.
        difference = np.nanmean(runs - gold[BASELINE], axis=1)
        if name == BASELINE:
            cells.append("")
        else:
            mean, low, high = mean_interval(difference)
            cells.append(f"{mean:+.3f} ({low:+.3f} … {high:+.3f})")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    demo: str = "runs/demo",
    output: str = "runs/objectives",
    objectives: list[str] = list(OBJECTIVES),  # noqa: B006  (never changed; jsonargparse shows it as the default)
    seeds: int = 5,
    pairs: int = 300,
    flipped: float = 0.25,
    options: list[str] = [],  # noqa: B006
    workers: int = 2,
) -> None:
    """Train, print the table, draw the curves.

    Args:
        demo: Folder that examples.sentiment.prepare filled.
        output: Folder for the runs.
        objectives: Which, by class name.
        seeds: How many seeds, from 0 on.
        pairs: Preference pairs of each ensemble.
        flipped: Share of the pairs whose label is wrong.
        options: More options of the ppo stage.
        workers: Runs side by side, each with its share of the processors.
    """
    root, source = Path(output), Path(demo)
    threads = max(1, (os.cpu_count() or 1) // workers)

    def one(job: tuple[str, int]) -> None:
        objective, seed = job
        folder = root / f"seed-{seed}" / objective
        align(source, folder, root / f"seed-{seed}" / "ensemble", objective, seed, options, threads)
        series = trained_metrics(folder)
        print(
            f"{objective} {seed}: KL {series['kl_k1'][-3:].mean():.2f}, gold {series['gold'][-3:].mean():.3f}",
            flush=True,
        )

    with ThreadPoolExecutor(workers) as pool:
        for seed in range(seeds):
            folder = root / f"seed-{seed}"
            # One after another within a seed's start: the ensemble is what all its runs wait for.
            train_ensemble(source, folder, pairs, flipped, seed, threads * workers)
            list(pool.map(one, [(objective, seed) for objective in objectives]))
    runs = {o: [trained_metrics(root / f"seed-{s}" / o) for s in range(seeds)] for o in objectives}
    gold = {o: np.array([at_kl(r["kl_k1"], r["gold"]) for r in series]) for o, series in runs.items()}
    result = table(gold)
    (root / "table.md").write_text(result + "\n")
    figures = {o: {"levels": list(LEVELS), "gold": values.tolist()} for o, values in gold.items()}
    (root / "gold_at_kl.json").write_text(json.dumps(figures, indent=2) + "\n")
    curves_at_kl(runs, LEVELS, at_kl).savefig(root / "objectives.png", dpi=150)
    print(f"\n{result}\n\n{root / 'objectives.png'}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
