"""Pictures of a run: its course, and its responses before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_vapo.figures.drawing import BLUE, GREY, ORANGE, drawing

# What is drawn of a stage: title -> metrics, each a line.
PANELS: dict[str, dict[str, tuple[str, ...]]] = {
    "ppo": {
        "reward": ("train/reward_mean", "train/gold"),
        "KL to the reference (k3), nats per response": ("train/kl_k3",),
        "members' disagreement σ": ("train/ensemble_sigma",),
        "critic: explained variance": ("train/explained_variance",),
    },
    "reward": {
        "loss": ("train/loss", "val/nll"),
        "accuracy on held-out pairs": ("val/accuracy",),
    },
    "sft": {"loss, nats per token": ("train/loss", "val/loss")},
}
COLOURS = (ORANGE, BLUE)
WHOSE = {"reference": GREY, "policy": BLUE}


def curves(path: str | Path, metrics: Sequence[Mapping[str, float]], stage: str) -> bool:
    """Draw what a run has logged; tell whether there was anything.

    Args:
        path: The PNG.
        metrics: Rows of `metrics.csv`.
        stage: `ppo`, `reward` or `sft`.
    """
    panels = {}
    for title, names in PANELS[stage].items():
        lines = {name: [(row["step"], row[name]) for row in metrics if name in row] for name in names}
        if lines := {name: points for name, points in lines.items() if points}:
            panels[title] = lines
    if not panels:
        return False
    rows = -(-len(panels) // 2)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with drawing(path, 9, 2.6 * rows) as figure:
        axes = list(figure.subplots(rows, min(2, len(panels)), squeeze=False).flat)
        for axis, (title, lines) in zip(axes, panels.items(), strict=False):
            for (name, points), colour in zip(lines.items(), COLOURS, strict=False):
                label = name.partition("/")[2] if name.startswith("train") else name
                axis.plot(*np.array(points).T, ".-", color=colour, linewidth=1.8, markersize=4, label=label)
            axis.set(title=title, xlabel="logged step")
            if len(lines) > 1:
                axis.legend(fontsize=8.5)
        for axis in axes[len(panels) :]:
            axis.remove()
    return True


def distributions(path: str | Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Draw how rewards and σ lie for the reference's responses and for the policy's.

    Args:
        path: The PNG.
        records: Responses, with `policy`, `reward`, and perhaps `sigma` and `gold`.
    """
    wanted = {"reward": "the ensemble's mean", "sigma": "σ of the members", "gold": "gold"}
    names = {name: title for name, title in wanted.items() if all(r.get(name) is not None for r in records)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with drawing(path, 9, 2.8) as figure:
        axes = figure.subplots(1, len(names), squeeze=False)[0]
        for axis, (name, title) in zip(axes, names.items(), strict=True):
            values = {who: [float(r[name]) for r in records if r["policy"] == who] for who in WHOSE}
            bins = np.histogram_bin_edges([x for part in values.values() for x in part], bins=20)
            for who, colour in WHOSE.items():
                if values[who]:
                    label = f"{who}: mean {np.mean(values[who]):.2f}"
                    axis.hist(values[who], bins=bins, color=colour, alpha=0.6, label=label)
            axis.set(title=title, ylabel="responses")
            axis.legend(fontsize=8.5)
