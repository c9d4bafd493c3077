"""How good is the first ensemble on somebody's own data? The README's path, without a choice of one's own.

Each seed trains, tests and exports an ensemble by the README's commands. Then 60 responses of the test part are scored
whole and cut in half, with and without the token that ends a response, in standard deviations of the reference's
rewards. Beside it stands the ensemble of one fixed layer, whose accuracy the default must reach.

    python benchmarks/first_ensemble.py --data DIALOGUES.jsonl --model MODEL_FOLDER --output FOLDER
"""

from __future__ import annotations

import json
import statistics
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from jsonargparse import auto_cli
from torch import Tensor

from lit_vapo.cli import main as lit_vapo
from lit_vapo.data.datamodule import PreferenceDataModule
from lit_vapo.functional import constant_share
from lit_vapo.rewards.features import compute_features
from lit_vapo.rewards.reward_model import RewardModel
from lit_vapo.types import TokenSequence

START = Path(__file__).parents[1] / "configs" / "reward" / "start.yaml"
STATES = ("whole + end", "whole, no end", "half, no end", "half + end")
EVALUATED = 60


def states(sequences: list[TokenSequence], end: int) -> dict[str, list[TokenSequence]]:
    """The responses whole and cut in half, with and without their end."""
    found: dict[str, list[TokenSequence]] = {name: [] for name in STATES}
    for ids, prompt in sequences:
        whole = ids[:-1] if ids[-1] == end and len(ids) > prompt + 1 else ids
        half = whole[: prompt + max(1, (len(whole) - prompt) // 2)]
        for name, kept in zip(STATES, ([*whole, end], whole, half, [*half, end]), strict=True):
            found[name].append(TokenSequence(kept, prompt))
    return found


@cache
def read(spec: str, folder: Path, file: Path) -> dict[str, Tensor]:
    """Features of the responses in each state, the same for all ensembles that read the same."""
    data = PreferenceDataModule(**yaml.safe_load(file.read_text()))
    model, end = RewardModel.from_pretrained(folder), int(data.text_tokenizer.eos_token_id)
    sequences = states(data.preferences("test").chosen[:EVALUATED], end)
    return {name: compute_features(model, each, torch.device("cpu")) for name, each in sequences.items()}


def examine(folder: Path, file: Path) -> dict[str, Any]:
    """What moves the rewards of an exported ensemble."""
    model = RewardModel.from_pretrained(folder, with_backbone=False)
    features = read(str(model.spec), folder, file)
    scored = {name: cast("Tensor", model.head(each).members) for name, each in features.items()}
    whole = scored["whole, no end"]
    return {
        "layer": model.spec.layer,
        "rewards": {name: float(members.mean()) for name, members in scored.items()},
        "content": float(whole.mean(1).std()),
        "end_effect": float((scored["whole + end"] - whole).mean()),
        "sigma2": float(whole.var(1).mean()),
        "sigma2_left": 1 - float(constant_share(whole)),
    }


def run(folder: Path, file: Path, model: str, seed: int, options: list[str], reference: bool) -> dict[str, Any]:
    """Train, test and export once, or read what an earlier call left."""
    target = folder / "result.json"
    if target.is_file():
        return dict(json.loads(target.read_text()))
    words = [
        f"--config={START}",
        f"--data={file}",
        f"--model.base.path={model}",
        # A seed is no choice: it tells how much of the result is chance. The cache changes no result.
        *(f"--{name}={seed}" for name in ("seed_everything", "model.head.seed", "model.seed")),
        f"--model.feature_cache={folder.parent / 'features'}",
        f"--trainer.default_root_dir={folder}",
        "--trainer.enable_progress_bar=false",
        *options,
    ]
    lit_vapo(["reward", "fit", *words, *([f"--model.reference.path={model}"] if reference else []), "--overwrite=true"])
    best = folder / "checkpoints" / "best.ckpt"
    lit_vapo(["reward", "test", *words, f"--ckpt_path={best}"])
    found = json.loads((folder / "test" / "evaluation.json").read_text())
    figures = {
        "seed": seed,
        "num_pairs": found["num_pairs"],
        **{name: found["mean"][name] for name in ("accuracy", "nll")},
        **{name: found["uncertainty"][name] for name in ("error_auroc", "sigma_constant_share")},
        "verdict": found["verdict"]["sentences"],
    }
    if reference:
        lit_vapo(["export", f"--checkpoint={best}", f"--output={folder / 'ensemble'}"])
        figures |= examine(folder / "ensemble", file)
    target.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each run, as Markdown."""
    names = ["ensemble", *STATES, "content", "σ² left", "accuracy", "NLL", "AUROC of σ"]
    lines = ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|"]
    for name, seeds in runs.items():
        for r in seeds:
            moved = [f"{r['rewards'][state]:.2f}" for state in STATES] if "rewards" in r else ["–"] * len(STATES)
            rest = [f"{r['content']:.2f}", f"{r['sigma2_left']:.0%}"] if "content" in r else ["–", "–"]
            scores = [f"{r[key]:.3f}" if r[key] is not None else "–" for key in ("accuracy", "nll", "error_auroc")]
            layer = f", layer {r['layer'] or 'last'}" if "layer" in r else ""
            lines.append("| " + " | ".join([f"{name}, seed {r['seed']}{layer}", *moved, *rest, *scores]) + " |")
    return "\n".join(lines)


def main(
    data: str,
    model: str,
    output: str,
    pairs: int = 600,
    max_length: int = 256,
    layer: int = 16,
    seeds: int = 3,
    options: list[str] = [],  # noqa: B006  (never changed; jsonargparse shows it as the default)
    result: str | None = None,
) -> None:
    """Print the table, and what of it holds.

    Args:
        data: File of dialogues or other preferences.
        model: Folder of the base model, which is the reference too.
        output: Folder for the runs. A run whose result is there is not repeated.
        pairs: Rows of the file to use.
        max_length: Most tokens of prompt and response.
        layer: The fixed layer to compare with.
        seeds: How many seeds, from 0 on.
        options: More options of the reward stage, where a machine is slow (references to sample, say).
        result: File to write all figures to, as JSON.
    """
    root = Path(output)
    root.mkdir(parents=True, exist_ok=True)
    rows = Path(data).read_text().splitlines(keepends=True)[:pairs]
    (root / "pairs.jsonl").write_text("".join(rows))
    file = root / "my_data.yaml"
    lengths = {"max_length": max_length, "max_prompt_length": max_length}
    parts = {"preferences": str(root / "pairs.jsonl"), "test_fraction": 0.2, "skip_invalid": True}
    file.write_text(yaml.safe_dump({"tokenizer": model, **parts, **lengths}))
    runs: dict[str, list[dict[str, Any]]] = {"start.yaml": [], f"layer {layer}, mean, 100 heads": []}
    default, fixed = runs
    for seed in range(seeds):
        runs[default].append(run(root / f"start-{seed}", file, model, seed, options, True))
        more = [*options, f"--model.layer={layer}", "--model.pooling=mean", "--model.head.num_members=100"]
        runs[fixed].append(run(root / f"fixed-{seed}", file, model, seed, more, False))
    print(f"\n{table(runs)}\n")
    accuracy = {name: statistics.mean(r["accuracy"] for r in each) for name, each in runs.items()}
    holds = {
        "the end token moves the reward by less than content": all(
            abs(r["end_effect"]) < r["content"] for r in runs[default]
        ),
        "80% of σ² are left without constants": all(r["sigma2_left"] >= 0.8 for r in runs[default]),
        "accuracy at least that of the fixed layer": accuracy[default] >= accuracy[fixed],
    }
    for name, held in holds.items():
        print(f"{name}: {'yes' if held else 'NO'}")
    settings = {"pairs": pairs, "max_length": max_length, "layer": layer, "seeds": seeds, "options": options}
    if result is not None:
        record = {"settings": settings, "accuracy": accuracy, "holds": holds, "runs": runs}
        Path(result).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
