"""What the demo achieved: summary.json, pictures, and a page that needs no server.

python -m examples.sentiment.report --output runs/demo
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from examples.sentiment.figures import Records, save_all, trained_metrics
from lit_vapo.functional import repetition
from lit_vapo.pages import html

SHOWN = 10


def summarise(reference: Records, policy: Records, judge: dict[str, Any], reward: dict[str, Any]) -> dict[str, Any]:
    """The figures of the demo; the gain has a paired bootstrap interval (95%, 10,000 draws)."""
    before, after = (np.array([r["gold"] for r in records]) for records in (reference, policy))
    draws = np.random.default_rng(0).integers(0, len(before), (10_000, len(before)))
    low, high = np.quantile((after - before)[draws].mean(1), [0.025, 0.975])
    log_ratio = np.array([r["kl"] for r in policy])
    return {
        "gold_reference": float(before.mean()),
        "gold_policy": float(after.mean()),
        "gold_gain": float((after - before).mean()),
        "gold_gain_95": [float(low), float(high)],
        "samples_each": len(before),
        "sequence_kl_k1": float(log_ratio.mean()),
        "sequence_kl_k3": float((np.exp(np.minimum(-log_ratio, 60)) - 1 + log_ratio).mean()),
        "reward_reference": float(np.mean([r["reward"] for r in reference])),
        "reward_policy": float(np.mean([r["reward"] for r in policy])),
        "sigma_reference": float(np.mean([r["sigma"] for r in reference])),
        "sigma_policy": float(np.mean([r["sigma"] for r in policy])),
        "repetition_reference": repetition([r["response"] for r in reference])._asdict(),
        "repetition_policy": repetition([r["response"] for r in policy])._asdict(),
        "judge": judge,
        "reward_model": reward,
    }


def _heat(value: float) -> str:
    """Red below zero, green above, paler towards it."""
    strength = min(abs(value) / 2.5, 1.0) * 62
    return f"hsl({0 if value < 0 else 130} 55% {92 - 0.55 * strength:.0f}%)"


def page(summary: dict[str, Any], pictures: dict[str, Path], reference: Records, policy: Records) -> str:
    """The report as one HTML page with its pictures inside."""
    pairs = list(zip(reference, policy, strict=True))[:SHOWN]
    filters = {"heat": _heat}
    return html("examples.sentiment", "report.html.j2", filters, s=summary, pictures=pictures, pairs=pairs)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"expected {path}: run the demo's steps in order (examples/sentiment/demo.sh)")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def print_table(summary: dict[str, Any]) -> None:
    """The end of the demo on the terminal."""
    s = summary
    table = Table(title=f"Held-out prompts: {s['samples_each']}, one response each", title_justify="left")
    for name in ("", "reference", "policy"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("gold: P(positive)", f"{s['gold_reference']:.3f}", f"{s['gold_policy']:.3f}", style="bold")
    table.add_row("ensemble reward", f"{s['reward_reference']:+.3f}", f"{s['reward_policy']:+.3f}")
    table.add_row("ensemble σ", f"{s['sigma_reference']:.3f}", f"{s['sigma_policy']:.3f}")
    table.add_row("KL, nats per response (k1)", "0", f"{s['sequence_kl_k1']:.2f}")
    before, after = s["repetition_reference"]["distinct_pairs"], s["repetition_policy"]["distinct_pairs"]
    table.add_row("distinct word pairs", f"{before:.2f}", f"{after:.2f}")
    Console().print(table)


def report(output: str) -> None:
    """Write report.html, figures and summary.json.

    Args:
        output: Folder of the demo.
    """
    root = Path(output)
    samples = root / "ppo" / "test" / "responses.jsonl"
    if not samples.is_file():
        raise ValueError(f"expected {samples}: run `lit-vapo ppo test` first")
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    by_prompt = {who: {r["prompt"]: r for r in records if r["policy"] == who} for who in ("reference", "policy")}
    prompts = [p for p in by_prompt["reference"] if p in by_prompt["policy"]]
    reference, policy = ([by_prompt[who][p] for p in prompts] for who in ("reference", "policy"))
    trained = trained_metrics(root / "ppo")
    summary = summarise(
        reference,
        policy,
        _read_json(root / "judge" / "quality.json"),
        _read_json(root / "reward" / "test" / "evaluation.json"),
    )
    (root / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    pictures = save_all(root / "figures", trained, reference, policy)
    (root / "report.html").write_text(page(summary, pictures, reference, policy), encoding="utf-8")
    print_table(summary)
    print(
        f"gold gain {summary['gold_gain']:+.3f}; figures in {root / 'summary.json'}, pictures in {root / 'report.html'}"
    )


if __name__ == "__main__":
    auto_cli(report, as_positional=False)
