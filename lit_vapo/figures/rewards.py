"""Pictures of a reward ensemble: is it calibrated, does it know its errors, where do members disagree.

Every function writes one PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from lit_vapo.evaluation.preference_report import PreferenceReport
from lit_vapo.figures.drawing import BLUE, GREY, ORANGE, drawing
from lit_vapo.functional import reliability_curve


def _check_pairs(report: PreferenceReport) -> None:
    if not report.num_pairs:
        raise ValueError("expected a report of at least one pair, got an empty one")


def reliability(report: PreferenceReport, path: str | Path) -> None:
    """Draw confidence against accuracy of the preferred side, in the bins of the calibration error.

    The mean of the members in colour, each member faint; below, where the pairs lie.

    Args:
        report: An evaluation.
        path: The PNG.

    Raises:
        ValueError: if the report is empty.
    """
    _check_pairs(report)
    curves = [reliability_curve(margins) for margins in report.margins.T]
    mean = curves[-1]
    edges = torch.linspace(0, 1, len(mean.share) + 1).tolist()
    with drawing(path, 4.8, 5.2) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        top.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", linewidth=1, label="calibrated")
        for k, curve in enumerate(curves[:-1]):
            there = curve.share > 0
            label = "members" if k == 0 else None
            top.plot(curve.confidence[there], curve.accuracy[there], color=BLUE, alpha=0.25, linewidth=1, label=label)
        there = mean.share > 0
        label = f"{'mean of members' if report.num_members else 'ensemble'}: ECE {float(report.ece[-1]):.3f}"
        top.plot(mean.confidence[there], mean.accuracy[there], "o-", color=ORANGE, linewidth=2.2, label=label)
        top.set(title=f"How often is it right when it is sure? {report.num_pairs} pairs", ylabel="accuracy in the bin")
        top.legend(loc="best")
        bottom.bar(edges[:-1], mean.share.tolist(), width=0.1, align="edge", color=ORANGE, alpha=0.6, edgecolor="white")
        bottom.set(xlim=(0.5, 1), xlabel="confidence in the preferred response, σ(|margin|)", ylabel="share of pairs")


def risk_coverage(report: PreferenceReport, path: str | Path) -> None:
    """Draw the error rate among the pairs that the ensemble is least uncertain about, by how many are kept.

    Beside it the best and the random order of the same pairs.

    Args:
        report: An evaluation.
        path: The PNG.

    Raises:
        ValueError: if the report is empty.
    """
    _check_pairs(report)
    curve = report.risk_coverage
    best = report.error.sort().values.cumsum(0) / torch.arange(1, report.num_pairs + 1)
    rate = float(report.error.mean())
    # The first few pairs jump between nobody and everybody wrong, and would flatten the rest of the curve.
    top = 120 * max(rate, float(curve.risk[curve.coverage >= 0.05].max()))
    with drawing(path, 5.2, 3.8) as figure:
        axis = figure.subplots()
        x = 100 * curve.coverage
        by_sigma = f"by σ of the margin: {float(curve.area):.3f}"
        axis.axhline(100 * rate, color=GREY, linestyle="--", linewidth=1.2, label=f"random order: area {rate:.3f}")
        axis.plot(x, 100 * curve.risk, color=ORANGE, linewidth=2.2, label=by_sigma)
        by_error = f"best order: {float(curve.best_area):.3f}"
        axis.plot(x, 100 * best, color=BLUE, linewidth=1.5, linestyle=":", label=by_error)
        axis.set(
            title="Is it right where it is sure?",
            xlabel="pairs kept, those with the least σ first (%)",
            ylabel="wrong among the kept (%)",
            xlim=(0, 100),
            ylim=(0, top or 1),
        )
        axis.legend(loc="best")


def sigma_histogram(
    sigma: Tensor,
    path: str | Path,
    *,
    other: Tensor | None = None,
    names: tuple[str, str] = ("this data set", "another data set"),
    unit: str = "standard deviations of the reference's rewards",
) -> None:
    """Draw the distribution of σ over responses (or pairs), and over those of another data set.

    Args:
        sigma: σ of each response (N,).
        path: The PNG.
        other: σ of each response of another data set (M,).
        names: What the two are called.
        unit: What σ is measured in.

    Raises:
        ValueError: if there is nothing to draw.
    """
    given = [values.detach().float().cpu() for values in (sigma, other) if values is not None]
    for values, name in zip(given, names, strict=False):
        if values.ndim != 1 or not len(values):
            raise ValueError(f"expected σ of shape (N,) with N >= 1 for {name}, got {tuple(values.shape)}")
    # The farthest hundredth shares the last bin: one far response would squeeze all others into the first.
    top = max(float(torch.quantile(values.double(), 0.99)) for values in given) or 1.0
    edges = torch.linspace(0, top, 41).tolist()
    with drawing(path, 5.6, 3.4) as figure:
        axis = figure.subplots()
        for values, name, color in zip(given, names, (BLUE, ORANGE), strict=False):
            weights = torch.full_like(values, 100 / len(values))
            label = f"{name}: {len(values)}, median {float(values.median()):.3g}"
            options: dict[str, Any] = {"bins": edges, "weights": weights.tolist(), "color": color}
            axis.hist(values.clamp(max=top).tolist(), **options, alpha=0.45, label=label)
            axis.hist(values.clamp(max=top).tolist(), **options, histtype="step", linewidth=1.4)
            axis.axvline(float(values.median()), color=color, linewidth=1.6, linestyle="--")
        beyond = "\nthe last bin holds all above it" if any(bool((values > top).any()) for values in given) else ""
        axis.set(title="How much members disagree", xlabel=f"σ over members ({unit}){beyond}", ylabel="share (%)")
        axis.set_xlim(0, top)
        axis.legend(loc="upper right")


def member_scores(
    scores: Tensor,
    labels: Sequence[str],
    path: str | Path,
    width: int = 60,
    unit: str = "standard deviations of the reference's rewards",
) -> None:
    """Draw every member's score of some responses: a row for each response, a dot for each member.

    The response that members disagree on most stands on top. As in the first figure of arXiv 2507.15906.

    Args:
        scores: Normalised scores (N, K).
        labels: What each response is called, e.g. the end of its prompt and its text.
        path: The PNG.
        width: How many characters of a label are shown.
        unit: What the scores are measured in.

    Raises:
        ValueError: if there are no scores, or not one label for each response.
    """
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"expected scores of shape (N, K) with N, K >= 1, got {tuple(scores.shape)}")
    if len(labels) != len(scores):
        raise ValueError(f"expected labels of {len(scores)} responses, got {len(labels)}")
    scores = scores.detach().float().cpu()
    sigma = scores.std(dim=1, correction=1) if scores.shape[1] > 1 else torch.zeros(len(scores))
    order = sigma.argsort(stable=True)
    scores, sigma = scores[order], sigma[order]
    shown = [shorten(" ".join(labels[i].split()), width, placeholder=" …") for i in order.tolist()]
    rows = torch.arange(len(scores))
    with drawing(path, 9, 1.5 + 0.34 * len(scores)) as figure:
        axis = figure.subplots()
        axis.hlines(rows, scores.amin(1), scores.amax(1), color=GREY, linewidth=1.2, zorder=2)
        dots = rows[:, None].expand_as(scores).flatten()
        axis.scatter(scores.mean(1), rows, s=200, color=ORANGE, marker="|", linewidth=3, label="their mean", zorder=3)
        axis.scatter(scores.flatten(), dots, s=26, color=BLUE, alpha=0.55, linewidth=0, label="a member", zorder=4)
        axis.set_yticks(rows.tolist(), shown, parse_math=False)
        axis.set(xlabel=f"reward ({unit})", ylim=(-0.7, len(scores) - 0.3))
        # On the figure and not the axes, which long labels make narrow.
        title = f"What {scores.shape[1]} reward models say of the same responses, the most disputed on top"
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        right = axis.twinx()
        right.set_ylim(axis.get_ylim())
        right.set_yticks(rows.tolist(), [f"σ {s:.2f}" for s in sigma.tolist()])
        right.tick_params(right=False)
        right.grid(visible=False)
        figure.legend(loc="outside lower center", ncols=2)


def preference_pictures(
    report: PreferenceReport, folder: Path, unit: str, outside: PreferenceReport | None = None
) -> None:
    """Draw `reliability.png`, `risk_coverage.png` and `sigma.png` of an evaluation; nothing of an empty one.

    Args:
        report: The evaluation.
        folder: Where to.
        unit: What σ is measured in.
        outside: An evaluation of pairs from elsewhere.
    """
    if not report.num_pairs:
        return
    reliability(report, folder / "reliability.png")
    risk_coverage(report, folder / "risk_coverage.png")
    other = None if outside is None or not outside.num_pairs else outside.response_sigma.flatten()
    sigma_histogram(report.response_sigma.flatten(), folder / "sigma.png", other=other, unit=unit)
