"""Which uncertainty estimator? Each is trained and tested by the command line, on several data sets and seeds.

Every run is a process of its own, so that its seconds and peak memory are its own. A run whose result is there is not
repeated: start again after a stop, or to add data and seeds.

    python benchmarks/estimators.py --data '{"harmless": "hh.jsonl", "pandalm": "pandalm.jsonl"}' --model MODEL_FOLDER
    python benchmarks/estimators.py     # a few made-up pairs and a tiny model, to see that it works
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jsonargparse import auto_cli

CONFIGS = Path(__file__).parents[1] / "configs"
ESTIMATORS = ("head_ensemble", "mc_dropout", "bayesian_linear", "lora_ensemble", "full_ensemble")
FIGURES = ("accuracy", "member_accuracy", "nll", "ece", "error_auroc", "aurc", "seconds", "memory_gb")


def run(words: list[str], log: Path) -> tuple[float, float]:
    """Run `lit-vapo` with these words; seconds and peak memory in GB.

    Raises:
        RuntimeError: It failed.
    """
    started = time.perf_counter()
    with log.open("a") as file:
        process = subprocess.Popen([sys.executable, "-m", "lit_vapo", *words], stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"lit-vapo {words[0]} {words[1]} ended with {process.returncode}: see {log}")
    return time.perf_counter() - started, usage.ru_maxrss / 1e6


def result(folder: Path, estimator: str, data: str, model: str, seed: int, options: list[str]) -> dict[str, float]:
    """Train and test once, or read what a run left."""
    target = folder / "result.json"
    if target.is_file():
        return dict(json.loads(target.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    words = [
        f"--config={CONFIGS / 'reward' / 'pairs.yaml'}",
        f"--config={CONFIGS / 'estimator' / f'{estimator}.yaml'}",
        f"--data.preferences={data}",
        f"--data.tokenizer={model}",
        f"--model.base.path={model}",
        f"--model.feature_cache={folder.parent / 'features'}",
        f"--model.head.seed={seed}",
        f"--data.seed={seed}",
        f"--seed_everything={seed}",
        f"--trainer.default_root_dir={folder}",
        "--trainer.enable_progress_bar=false",
        *options,
    ]
    seconds, memory = run(["reward", "fit", *words, "--overwrite=true"], folder / "log.txt")
    run(["reward", "test", *words, f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"], folder / "log.txt")
    found = json.loads((folder / "evaluation.json").read_text())
    members = found["members"]
    figures = {
        **found["mean"],
        **found["uncertainty"],
        **found["temperature"],
        "member_accuracy": statistics.mean(m["accuracy"] for m in members),
        "num_pairs": found["num_pairs"],
        "seconds": seconds,
        "memory_gb": memory,
    }
    target.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def table(name: str, results: dict[str, list[dict[str, float]]]) -> str:
    """Mean ± standard deviation over seeds, as Markdown."""
    lines = [f"| {name} | " + " | ".join(FIGURES) + " |", "| --- " * (len(FIGURES) + 1) + "|"]
    for estimator, runs in results.items():
        cells = []
        for figure in FIGURES:
            values = [r[figure] for r in runs if r[figure] is not None]
            digits = 0 if figure == "seconds" else 1 if figure == "memory_gb" else 3
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}" if values else "–")
        lines.append(f"| `{estimator}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def made_up(folder: Path) -> tuple[dict[str, str], str]:
    """Pairs and a tiny random model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(60)] + ["good", "bad"]
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<pad>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 12}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes))
    for part in (model, fast):
        part.save_pretrained(folder / "model")
    rng = random.Random(0)
    rows = []
    for _ in range(120):
        prompt = " ".join(rng.choices(words[:60], k=8))
        sides = [" ".join([*rng.choices(words[:60], k=4), end]) for end in ("good", "bad")]
        if rng.random() < 0.2:
            sides.reverse()
        rows.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"made up": str(folder / "pairs.jsonl")}, str(folder / "model")


def main(
    data: dict[str, str] | None = None,
    model: str | None = None,
    output: str | None = None,
    estimators: list[str] = list(ESTIMATORS),  # noqa: B006  (never changed; jsonargparse shows it as the default)
    seeds: int = 3,
    options: list[str] = [],  # noqa: B006
) -> None:
    """Print a table for each data set.

    Args:
        data: File of preferences by name of the data set; `null` makes up a few.
        model: Folder of the base model; `null` makes a tiny one.
        output: Folder for the runs; `null` takes a temporary one.
        estimators: Files under configs/estimator/, without their ending.
        seeds: How many seeds, from 0 on.
        options: More options of the reward stage.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(output or scratch)
        if data is None or model is None:
            data, model = made_up(Path(scratch))
            seeds = min(seeds, 2)
        for name, file in data.items():
            results: dict[str, list[dict[str, float]]] = {}
            for estimator in estimators:
                for seed in range(seeds):
                    folder = root / name / f"{estimator}-{seed}"
                    figures = result(folder, estimator, file, model, seed, options)
                    results.setdefault(estimator, []).append(figures)
                    print(f"{name} {estimator} {seed}: accuracy {figures['accuracy']:.3f}", flush=True)
            print(f"\n{table(name, results)}\n", flush=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
