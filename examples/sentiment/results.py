"""What the demo's runs left on disk, read back and summed up."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lit_vapo.functional import kl_k1, kl_k3, weighted_k3

Array = np.ndarray


class Curves(NamedTuple):
    """One training run: quantity -> its values, without the split in front.

    Attributes:
        train: one value for each iteration, NaN where a row lacks it; `iteration` is always there.
        val: one value for each evaluation, with the `iteration` after which it was made.
        path: the file they come from.
    """

    train: dict[str, Array]
    val: dict[str, Array]
    path: Path


def newest_metrics(run: Path) -> Path:
    """The newest `metrics.csv` below a run's folder that has rows of training.

    Raises:
        FileNotFoundError: there is none (an evaluation writes a file of its own, which does not count).
    """
    found = sorted(run.rglob("metrics.csv"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        with path.open(newline="") as file:
            if any(name.startswith("train/") for name in next(csv.reader(file), [])):
                return path
    raise FileNotFoundError(f"expected a metrics.csv of training below {run}, got {[str(p) for p in found] or 'none'}")


def read_curves(path: Path) -> Curves:
    """Curves from Lightning's CSV log, in which training and evaluation have rows of their own.

    Raises:
        ValueError: there is no row of training.
    """
    rows: dict[str, list[dict[str, float]]] = {"train": [], "val": []}
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                values = {key: float(cell) for key, cell in row.items() if key and cell not in ("", None)}
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: expected numbers, got {row}") from error
            for split, kept in rows.items():
                own = {key.removeprefix(f"{split}/"): x for key, x in values.items() if key.startswith(f"{split}/")}
                if own:
                    done = len(rows["train"]) + (split == "train")
                    kept.append({"iteration": float(done), **own})
    if not rows["train"]:
        raise ValueError(f"{path}: expected rows with train/ columns, got none")
    return Curves(_columns(rows["train"]), _columns(rows["val"]), path)


def _columns(rows: list[dict[str, float]]) -> dict[str, Array]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}


class Pair(NamedTuple):
    """What reference and policy made of one held-out prompt (records as in `samples_test.jsonl`)."""

    prompt: str
    reference: dict[str, Any]
    policy: dict[str, Any]


NEEDED = ("policy", "prompt", "response", "reward", "sigma", "members", "kl", "kl_weight", "gold")


def read_pairs(path: Path) -> list[Pair]:
    """Pair the reference's and the policy's responses to the same prompts, in the reference's order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a record lacks a field (names file and line), or the two answered different prompts.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected the samples of a test, got no file {path} (lit-vapo ppo test writes it)")
    answers: dict[str, dict[str, list[dict[str, Any]]]] = {"reference": defaultdict(list), "policy": defaultdict(list)}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        record = json.loads(line)
        missing = [name for name in NEEDED if name not in record]
        if missing or record["policy"] not in answers:
            raise ValueError(f"{path}, line {number}: expected the fields {NEEDED}, got {sorted(record)} ({missing=})")
        answers[record["policy"]][record["prompt"]].append(record)
    reference, policy = answers["reference"], answers["policy"]
    counts = {who: {prompt: len(records) for prompt, records in by.items()} for who, by in answers.items()}
    if counts["reference"] != counts["policy"] or not reference:
        sizes = {who: sum(count.values()) for who, count in counts.items()}
        raise ValueError(f"{path}: expected the same prompts for reference and policy, got {sizes} responses")
    return [Pair(prompt, a, b) for prompt in reference for a, b in zip(reference[prompt], policy[prompt], strict=True)]


def bootstrap_interval(differences: Array, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap, 95%, of the mean of paired differences (N,)."""
    rows = np.random.default_rng(seed).integers(len(differences), size=(resamples, len(differences)))
    low, high = np.quantile(differences[rows].mean(1), [0.025, 0.975])
    return float(low), float(high)


def fluency(responses: list[str]) -> dict[str, float]:
    """How varied texts are: crude, but enough to see a policy that has collapsed onto one phrase.

    Returns:
        `length_words`: mean length in words. `distinct_2`: distinct pairs of adjacent words over all such pairs,
        counted in all responses together (depends on their number: compare equal numbers only). `repetition`: share
        of a response's pairs that occurred in it before, averaged over responses.
    """
    words = [response.lower().split() for response in responses]
    pairs = [list(pairwise(text)) for text in words]
    total = sum(map(len, pairs))
    distinct = len({pair for text in pairs for pair in text})
    repeated = [1 - len(set(text)) / len(text) for text in pairs if text]
    return {
        "length_words": float(np.mean([len(text) for text in words])),
        "distinct_2": distinct / total if total else 0.0,
        "repetition": float(np.mean(repeated)) if repeated else 0.0,
    }


def summarise(pairs: list[Pair]) -> dict[str, Any]:
    """Means over the held-out prompts, before (reference) and after (policy), and what the policy gained."""

    def side(records: list[dict[str, Any]]) -> dict[str, Any]:
        means = {name: float(np.mean([r[name] for r in records])) for name in ("gold", "reward", "sigma")}
        return {**means, **fluency([r["response"] for r in records])}

    gain = np.array([pair.policy["gold"] - pair.reference["gold"] for pair in pairs])
    log_ratio = torch.tensor([pair.policy["kl"] for pair in pairs], dtype=torch.float64)
    weight = torch.tensor([pair.policy["kl_weight"] for pair in pairs], dtype=torch.float64)
    return {
        "num_prompts": len(pairs),
        "reference": side([pair.reference for pair in pairs]),
        "policy": side([pair.policy for pair in pairs]),
        "gold_gain": float(gain.mean()),
        "gold_gain_interval_95": list(bootstrap_interval(gain)),
        "gold_better_share": float((gain > 0).mean()),
        "kl_k1": float(kl_k1(log_ratio).mean()),
        "kl_k3": float(kl_k3(log_ratio).mean()),
        "kl_weighted_k3": float(weighted_k3(log_ratio, weight).mean()),
        "kl_weight_mean": float(weight.mean()),
    }
