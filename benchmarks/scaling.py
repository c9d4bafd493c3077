"""How an iteration of PPO grows: with responses, batch, heads, the size of the model, kinds of members, processes.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --model FOLDER --picture scaling.png

Each run has a process of its own and one thread. All but one setting are those of the first line that is printed. Times
are processor times of whole iterations, the first left out. Runs in several processes are told in seconds that passed,
beside one process at the same batch; nothing else may run on the machine then.

A slope is that of the logarithm of time over the logarithm of the setting: 1 where cost is proportional, 0 where the
setting is free. The share that a head costs is the slope of a straight line through the heads, over the time with the
fewest.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jsonargparse import auto_cli
from safetensors import safe_open

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "workers")]

from job import start  # noqa: E402
from ppo_job import Answer, Job  # noqa: E402
from ppo_speed import prompts  # noqa: E402
from ppo_task import train_heads  # noqa: E402
from reward_uq import make_model, write_pairs  # noqa: E402

from lit_vapo.folders import claim_folder, new_folder  # noqa: E402
from lit_vapo.models.weights import quiet  # noqa: E402

AXES = {
    "response_length": "tokens of a response",
    "batch_size": "responses",
    "members": "heads",
    "parameters": "parameters of the policy",
}


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of a straight line through points."""
    slope, intercept = statistics.linear_regression(x, y)
    return slope, intercept


def main(
    work: str = "runs/scaling",
    model: str | None = None,
    iterations: int = 3,
    repetitions: int = 3,
    batch_size: int = 16,
    prompt_length: int = 25,
    response_length: int = 32,
    epochs: int = 2,
    minibatches: int = 2,
    response_lengths: list[int] = [16, 32, 64, 128],  # noqa: B006
    batch_sizes: list[int] = [8, 16, 32, 64],  # noqa: B006
    heads: list[int] = [2, 10, 100],  # noqa: B006
    widths: list[int] = [256, 512, 1024],  # noqa: B006
    kinds: list[str] = ["HeadEnsemble", "LoraEnsemble", "FullEnsemble"],  # noqa: B006
    kind_members: int = 4,
    processes: list[int] = [1, 2],  # noqa: B006
    process_batch: int = 64,
    picture: str | None = None,
) -> None:
    """Print the tables.

    Args:
        work: Folder for models and runs; what is there is used again, and that of other options refused.
        model: Folder of the policy; `null` makes a Llama of 6.3 million random parameters.
        iterations: Iterations of a run.
        repetitions: Runs of each setting; the median counts.
        batch_size: Responses of an iteration.
        prompt_length: Words of a prompt.
        response_length: Tokens of a response.
        epochs: Passes over a rollout.
        minibatches: Weight updates of a pass.
        response_lengths: Lengths to try.
        batch_sizes: Batches to try.
        heads: Numbers of reward heads to try; the second is that of all other runs.
        widths: Widths of Llamas to try, of four blocks each.
        kinds: Estimators to try.
        kind_members: Members of each of them.
        processes: Numbers of processes to try.
        process_batch: Responses of an iteration there, over all processes.
        picture: Where to draw times and slopes (`.png`), if anywhere.
    """
    quiet()
    root = Path(work)
    root.mkdir(parents=True, exist_ok=True)
    claim_folder(root, "--work", {"model": model, "prompt_length": prompt_length, "response_length": response_length})

    def llama(width: int = 256) -> Path:
        folder = root / f"policy_{width}"
        if not folder.is_dir():
            with new_folder(folder, "--work") as partial:
                make_model(partial, width)
        return folder

    policy = llama() if model is None else Path(model)
    most = max(*batch_sizes, process_batch, batch_size) * iterations
    asked = prompts(root / "prompts.jsonl", most, prompt_length, prompt_length)
    preferences = root / "preferences.jsonl"
    write_pairs(preferences, 64)

    def ensemble(count: int, kind: str = "HeadEnsemble", base: Path = policy) -> str:
        folder = root / f"{kind}_{count}_{base.name}"
        if not folder.is_dir():
            with new_folder(folder, "--work") as partial:
                train_heads(partial, base, str(preferences), 0, count, 128, response_length, kind)
        return str(folder / "ensemble")

    usual = Job(
        str(policy), ensemble(heads[1]), "", asked, str(root), [], iterations, batch_size, prompt_length,
        response_length, epochs, minibatches, 1e-3, 0.05, "reference", 16, objective="VarianceAware",
    )  # fmt: skip

    def measured(job: Job) -> tuple[float, float, float]:
        """Processor seconds of an iteration, those that passed, and peak memory in 10⁶ bytes."""
        runs = [
            Answer(**start(sys.executable, "ppo_ours.py", replace(job, seed=seed), root, threads=1))
            for seed in range(repetitions)
        ]
        return (
            statistics.median(x for run in runs for x in run.seconds[1:]),
            statistics.median(x for run in runs for x in run.elapsed[1:]),
            statistics.median(run.peak_mb for run in runs),
        )

    print(f"batch {batch_size}, prompts of {prompt_length}, responses of {response_length}, {heads[1]} heads")
    found: dict[str, list[tuple[int, float, float]]] = {}
    tried = {"response_length": response_lengths, "batch_size": batch_sizes, "members": heads}
    for axis, values in tried.items():
        for value in values:
            change = {"ensemble": ensemble(value)} if axis == "members" else {axis: value}
            seconds, _, peak = measured(replace(usual, **change))  # type: ignore[arg-type]
            found.setdefault(axis, []).append((value, seconds, peak))
            print(f"{axis} {value}: {seconds:.3g} s, {peak:.0f} MB", flush=True)
    for width in widths:
        base = llama(width)
        seconds, _, peak = measured(replace(usual, policy=str(base), ensemble=ensemble(heads[1], base=base)))
        found.setdefault("parameters", []).append((size(base), seconds, peak))
        print(f"width {width}, {size(base):,} parameters: {seconds:.3g} s, {peak:.0f} MB", flush=True)
    for kind in kinds:
        seconds, _, peak = measured(replace(usual, ensemble=ensemble(kind_members, kind)))
        print(f"{kind} of {kind_members}: {seconds:.3g} s, {peak:.0f} MB", flush=True)
    print("\n| what grows | from, to | s | MB | slope of time |\n| --- | --- | --- | --- | --- |")
    for axis, points in found.items():
        values, seconds, peaks = zip(*points, strict=True)
        slope, _ = line([math.log(x) for x in values], [math.log(x) for x in seconds])
        ends = [f"{column[0]:.3g}, {column[-1]:.3g}" for column in (values, seconds)]
        print(f"| {AXES[axis]} | {' | '.join(ends)} | {peaks[0]:.0f}, {peaks[-1]:.0f} | {slope:.2f} |")
    slope, intercept = line([n for n, _, _ in found["members"]], [s for _, s, _ in found["members"]])
    share = slope / (intercept + slope * heads[0])
    print(f"\na further head costs {share:.3%} of an iteration with {heads[0]}")
    passed = {}
    for count in processes:
        # The batch of a job is a process's own.
        own = replace(usual, batch_size=process_batch // count, processes=count)
        passed[count] = measured(own)[1]
        ratio = passed[processes[0]] / passed[count]
        print(f"{count} processes, batch {process_batch} in all: {passed[count]:.3g} s, {ratio:.2f} times as fast")
    if picture is not None:
        draw(found, Path(picture))


def size(model: Path) -> int:
    """Parameters of a model in one file; what is stored once counts once."""
    with safe_open(model / "model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def draw(found: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    """Time over each setting, both on logarithmic axes, with the line of a cost that is proportional."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(10, 3), sharey=True, layout="constrained")
    for panel, (axis, points) in zip(panels, found.items(), strict=True):
        values, seconds, _ = zip(*points, strict=True)
        panel.loglog(values, seconds, "o-", base=2)
        panel.loglog(values, [seconds[-1] * x / values[-1] for x in values], ":", color="grey", label="proportional")
        labels = [f"{x / 1e6:.0f}M" if x > 1e6 else x for x in values]
        panel.set(xlabel=AXES[axis], xticks=values, xticklabels=labels)
        panel.minorticks_off()
    panels[0].set(ylabel="processor seconds\nof an iteration")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
