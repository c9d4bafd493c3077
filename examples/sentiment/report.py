"""What the demo achieved: summary.json, pictures, and a page that needs no server.

python -m examples.sentiment.report --output runs/demo
"""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from examples.sentiment.figures import Records, save_all, trained_metrics
from lit_vapo.functional import repetition

SHOWN = 10
CSS = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 1080px; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
img { width: 100%; height: auto; background: white; border-radius: 6px; margin: .4rem 0 }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
td.n, th.n { text-align: right } .who { opacity: .7; white-space: nowrap } .prompt { font-weight: 600 }
.members td { padding: .15rem .3rem; text-align: center; font-size: .72rem; border: 0; color: #111; border-radius: 3px }
.cards { display: flex; gap: 1rem; flex-wrap: wrap }
.card { background: var(--soft); border-radius: 8px; padding: .7rem 1rem }
.card b { display: block; font-size: 1.5rem }
"""


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


def _sample(record: dict[str, Any], who: str) -> str:
    cells = "".join(f'<td style="background:{_heat(m)}">{m:+.1f}</td>' for m in record["members"])
    return (
        f'<tr><td class="who">{who}</td><td>{html.escape(record["response"].strip())}</td>'
        f'<td class="n">{record["gold"]:.2f}</td><td class="n">{record["reward"]:+.2f}</td>'
        f'<td class="n">{record["sigma"]:.2f}</td><td class="n">{record["kl"]:.1f}</td>'
        f'<td><table class="members"><tr>{cells}</tr></table></td></tr>'
    )


def page(summary: dict[str, Any], pictures: dict[str, Path], reference: Records, policy: Records) -> str:
    """The report as one HTML page with its pictures inside."""
    s = summary
    low, high = s["gold_gain_95"]
    cards = (
        ("gold, before", f"{s['gold_reference']:.2f}"),
        ("gold, after", f"{s['gold_policy']:.2f}"),
        ("gain (95% interval)", f"{s['gold_gain']:+.2f} ({low:+.2f} … {high:+.2f})"),
        ("KL, nats per response", f"{s['sequence_kl_k1']:.1f}"),
        ("held-out prompts", str(s["samples_each"])),
    )
    titles = {
        "reward_against_kl": "Gold and ensemble reward against KL",
        "over_training": "Over training",
        "before_and_after": "Before and after",
    }
    images = "".join(
        f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,'
        f'{base64.b64encode(pictures[name].read_bytes()).decode()}">'
        for name, title in titles.items()
    )
    rows = "".join(
        f'<tr><td colspan="7" class="prompt">{html.escape(r["prompt"])} …</td></tr>'
        + _sample(r, "reference")
        + _sample(p, "policy")
        for r, p in list(zip(reference, policy, strict=True))[:SHOWN]
    )
    quality = "".join(
        f'<tr><td>{name}</td><td class="n">{m["accuracy"]:.3f}</td><td class="n">{m["nll"]:.3f}</td>'
        f'<td class="n">{m["ece"]:.3f}</td></tr>'
        for name, m in [
            *((f"member {k}", m) for k, m in enumerate(s["reward_model"]["members"])),
            ("mean of members", s["reward_model"]["mean"]),
            ("judge (single sentences)", s["judge"]),
        ]
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>lit-vapo: the demo</title><style>{CSS}</style>
<h1>Kinder film reviews</h1>
<p>SmolLM2-135M-Instruct continues the first words of film reviews. Ten reward heads learned from human labels how
positive a continuation is; variance-aware PPO raised their mean, and paid more for leaving the reference where they
disagree. A judge that training never saw scores reference and policy on the same held-out prompts.</p>
<div class="cards">{"".join(f'<div class="card">{name}<b>{value}</b></div>' for name, value in cards)}</div>
{images}
<h2>Ten prompts</h2>
<p>The first ten held-out prompts, not chosen. Members' rewards are in standard deviations over the reference's
responses.</p>
<table><tr><th></th><th>continuation</th><th class="n">gold</th><th class="n">reward</th><th class="n">σ</th>
<th class="n">log π/π₀</th><th>members</th></tr>{rows}</table>
<h2>How good are the reward models, and the judge?</h2>
<p>Held-out pairs for the members, single sentences for the judge, which makes its task the harder one.</p>
<table><tr><th></th><th class="n">accuracy</th><th class="n">NLL</th><th class="n">ECE</th></tr>{quality}</table>
</html>
"""


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
