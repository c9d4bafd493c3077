"""The demo's pictures."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

POLICY, REFERENCE, REWARD = "#2563a8", "#8a8f98", "#c4701c"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.edgecolor": "#8a8f98",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "font.size": 9.5,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
}
Records = list[dict[str, Any]]
Series = dict[str, np.ndarray]


def read_metrics(path: Path) -> dict[str, Series]:
    """Columns of a metrics.csv by split, each aligned with the split's own rows.

    Raises:
        ValueError: There is no such file.
    """
    if not path.is_file():
        raise ValueError(f"expected the metrics of a ppo run, got {path}, which does not exist")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    out: dict[str, Series] = {}
    for split in ("train", "val"):
        own = [r for r in rows if r.get(f"{split}/reward_mean")]
        names = [n for n in (rows[0] if rows else {}) if n.startswith(f"{split}/")]
        out[split] = {n.split("/")[1]: np.array([float(r[n]) if r[n] else np.nan for r in own]) for n in names}
    return out


def trained_metrics(folder: Path) -> Series:
    """What a run of PPO logged in its iterations, by its newest fit: tests and validations leave a metrics.csv too.

    Raises:
        ValueError: There is no fit.
    """
    logs = sorted(folder.glob("logs/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1]))
    trained = [series for log in logs if "iteration" in (series := read_metrics(log)["train"])]
    if not trained:
        raise ValueError(f"expected metrics of a ppo fit below {folder / 'logs'}, got none")
    return trained[-1]


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a third of the points, less at the ends."""
    half = len(values) // 6
    return np.array([np.nanmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _course(axis: Any, train: Series, key: str, color: str) -> Any:
    """A point an iteration against the KL, and the course of many; a line through few would show their noise."""
    points = axis.scatter(train["kl_k1"], train[key], c=train["iteration"], cmap="viridis", s=26, zorder=3)
    order = np.argsort(train["kl_k1"])
    if len(order) >= 12:
        axis.plot(train["kl_k1"][order], smooth(train[key][order]), color=color, linewidth=2)
    return points


def _line(axis: Any, x: np.ndarray, y: np.ndarray, color: str, label: str) -> None:
    axis.plot(x, y, color=color, alpha=0.3, linewidth=1)
    axis.plot(x, smooth(y), color=color, linewidth=2.2, label=label)


def reward_against_kl(train: Series) -> Figure:
    """Gold and ensemble reward against the KL to the reference, one point an iteration."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    panels = (("gold", "Gold: P(positive)", POLICY), ("reward_mean", "Ensemble reward", REWARD))
    for axis, (key, title, color) in zip(axes, panels, strict=True):
        if key not in train:
            continue
        points = _course(axis, train, key, color)
        axis.set(title=title, xlabel="KL to the reference (nats per response)")
    figure.colorbar(points, ax=axes, label="iteration", pad=0.01)
    return figure


def over_training(train: Series) -> Figure:
    """Rewards, KL and disagreement by iteration."""
    figure, axes = plt.subplots(1, 4, figsize=(12.5, 3), layout="constrained")
    x = train["iteration"]
    if "gold" in train:
        _line(axes[0], x, train["gold"], POLICY, "gold")
    axes[0].set(title="Gold: P(positive)", ylim=(0, 1))
    _line(axes[1], x, train["reward_mean"], REWARD, "mean of members")
    axes[1].set(title="Ensemble reward")
    _line(axes[2], x, train["kl_k1"], REFERENCE, "KL")
    _line(axes[2], x, train["kl_weighted_k3"], POLICY, "weighted KL")
    axes[2].legend(frameon=False)
    axes[2].set(title="KL (nats per response)")
    _line(axes[3], x, train["ensemble_sigma"], REWARD, "σ")
    axes[3].set(title="Ensemble σ", ylim=(0, None))
    for axis in axes:
        axis.set_xlabel("iteration")
    return figure


def before_and_after(reference: Records, policy: Records) -> Figure:
    """Distribution of gold scores of the reference's and of the policy's responses to the same prompts."""
    figure, axis = plt.subplots(figsize=(6.2, 3.2), layout="constrained")
    bins = np.linspace(0, 1, 21)
    for records, color, name in ((reference, REFERENCE, "reference"), (policy, POLICY, "policy")):
        gold = np.array([r["gold"] for r in records])
        axis.hist(gold, bins=bins, color=color, alpha=0.55, label=f"{name}: mean {gold.mean():.2f}")
        axis.axvline(gold.mean(), color=color, linewidth=2)
    axis.set(
        title="Gold scores on held-out prompts, before and after",
        xlabel="P(positive) by the judge",
        ylabel="responses",
    )
    axis.legend(frameon=False, loc="upper left")
    return figure


def headline(train: Series, reference: Records, policy: Records) -> Figure:
    """The demo in one picture: gold against KL, disagreement, gold before and after."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    figure.colorbar(_course(axes[0], train, "gold", POLICY), ax=axes[0], label="iteration", pad=0.01)
    axes[0].set(title="Gold reward against KL", xlabel="KL to the reference (nats)", ylabel="P(positive)")
    _line(axes[1], train["iteration"], train["ensemble_sigma"], REWARD, "σ")
    axes[1].set(title="Disagreement of the reward heads", xlabel="iteration", ylabel="σ", ylim=(0, None))
    bins = np.linspace(0, 1, 21)
    for records, color, name in ((reference, REFERENCE, "before"), (policy, POLICY, "after")):
        gold = np.array([r["gold"] for r in records])
        axes[2].hist(gold, bins=bins, color=color, alpha=0.55, label=f"{name}: mean {gold.mean():.2f}")
    axes[2].set(title="Gold scores, held-out prompts", xlabel="P(positive)", ylabel="responses")
    axes[2].legend(frameon=False, loc="upper left")
    return figure


def save_all(folder: Path, train: Series, reference: Records, policy: Records) -> dict[str, Path]:
    """Draw every picture into `folder`; their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    with plt.rc_context(STYLE):
        pictures = {
            "headline": headline(train, reference, policy),
            "reward_against_kl": reward_against_kl(train),
            "over_training": over_training(train),
            "before_and_after": before_and_after(reference, policy),
        }
        for name, figure in pictures.items():
            paths[name] = folder / f"{name}.png"
            figure.savefig(paths[name])
            plt.close(figure)
    return paths
