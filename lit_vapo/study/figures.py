"""Pictures of a study: distributions of the return, mean against risk, return against KL, effects by setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_vapo.figures.drawing import COLOURS, GREY, drawing
from lit_vapo.study.experiment import Record
from lit_vapo.study.summary import Outcome


def colours(methods: Sequence[str]) -> dict[str, str]:
    """A colour for each method; a scale from dark to light where there are many."""
    if len(methods) <= len(COLOURS):
        return dict(zip(methods, COLOURS, strict=False))
    scale = mpl.colormaps["viridis"](np.linspace(0, 0.92, len(methods)))
    return {method: mpl.colors.to_hex(colour) for method, colour in zip(methods, scale, strict=True)}


def _names(things: Sequence[Any], attribute: str) -> list[str]:
    """Different values of an attribute, in the order of their first appearance."""
    return list(dict.fromkeys(getattr(thing, attribute) for thing in things))


def _columns(panels: Sequence[str]) -> int:
    """Columns of panels: rows are full where that can be, as with four or eight."""
    return min(len(panels), 2 if len(panels) % 2 == 0 and len(panels) % 3 else 3)


def _panels(figure: Figure, settings: Sequence[str], **options: Any) -> list[Axes]:
    """A panel for each setting, named by it."""
    columns = _columns(settings)
    grid = figure.subplots(-(-len(settings) // columns), columns, squeeze=False, **options)
    axes = list(grid.flat)
    for axis in axes[len(settings) :]:
        axis.remove()
    for axis, setting in zip(axes, settings, strict=False):
        axis.set_title(setting, fontsize=9)
    return axes[: len(settings)]


def _size(settings: Sequence[str], height: float) -> tuple[float, float]:
    columns = _columns(settings)
    return (2.2 + 2.9 * columns, 0.8 + height * -(-len(settings) // columns))


def distributions(found: Sequence[Outcome], path: str | Path) -> None:
    """Draw how the true return is distributed over repetitions, by method: the picture of the claim.

    Each setting has a panel. Left of the line at zero the run ended worse than it began.

    Args:
        found: Outcomes at one point.
        path: The PNG.
    """
    settings, methods = _names(found, "setting"), _names(found, "method")
    colour = colours(methods)
    with drawing(path, *_size(settings, 0.7 + 0.26 * len(methods))) as figure:
        for i, (axis, setting) in enumerate(zip(_panels(figure, settings, sharex=True), settings, strict=True)):
            here = [o for o in found if o.setting == setting and len(o.gains) > 1]
            for row, outcome in enumerate(reversed(here)):
                gains = np.array(list(outcome.gains.values()))
                if np.ptp(gains) > 0:
                    options: Any = {"orientation": "horizontal", "widths": 0.9, "showextrema": False, "points": 60}
                    drawn: Any = axis.violinplot(gains, [row], **options)
                    drawn["bodies"][0].set(facecolor=colour[outcome.method], alpha=0.45, linewidth=0)
                low, middle, high = np.quantile(gains, [0.05, 0.5, 0.95])
                axis.plot([low, high], [row, row], color=colour[outcome.method], linewidth=1.6)
                axis.plot(middle, row, "o", color=colour[outcome.method], markersize=4)
            labels = [o.method for o in reversed(here)] if i % _columns(settings) == 0 else [""] * len(here)
            axis.set_yticks(range(len(here)), labels, fontsize=8)
            axis.axvline(0, color="black", linewidth=1, linestyle="--")
            axis.grid(axis="y", visible=False)
        # The farthest thousandth would squeeze all others.
        every = np.concatenate([list(o.gains.values()) for o in found if o.gains])
        low, high = np.quantile(every, [0.001, 0.999])
        axis.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        figure.supxlabel("true return less the reference's (dot: median, bar: 5% to 95%)", fontsize=9.5)


def mean_risk(found: Sequence[Outcome], path: str | Path) -> None:
    """Draw every method's mean gain against its risk, a panel for each point and a mark for each setting.

    Args:
        found: Outcomes.
        path: The PNG.
    """
    points, methods = _names(found, "point"), _names(found, "method")
    colour = colours(methods)
    with drawing(path, *_size(points, 3.1)) as figure:
        for axis, point in zip(_panels(figure, points), points, strict=True):
            for method in methods:
                rows = [o.row() for o in found if o.point == point and o.method == method and o.gains]
                x, y = [r["gain"].value for r in rows], [100 * r["risk"].value for r in rows]
                spread = [[100 * (r["risk"].value - r["risk"].low) for r in rows]]
                spread += [[100 * (r["risk"].high - r["risk"].value) for r in rows]]
                style: Any = {"fmt": "o", "markersize": 5, "alpha": 0.75, "elinewidth": 0.8}
                axis.errorbar(x, y, np.clip(spread, 0, None), color=colour[method], label=method, **style)
            axis.set_ylim(bottom=-1)
            axis.axvline(0, color=GREY, linewidth=0.8)
        figure.supxlabel("mean true return less the reference's (right is better)", fontsize=9.5)
        figure.supylabel("risk of ending worse, % (lower is better)", fontsize=9.5)
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8.5)


def return_against_kl(records: Sequence[Record], path: str | Path) -> None:
    """Draw the median true return along the runs against their mean KL, and what the worst twentieth falls below.

    Args:
        records: Records of runs with more than one point.
        path: The PNG.
    """
    settings, methods = _names(records, "setting"), _names(records, "method")
    colour = colours(methods)
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.setting, record.method), []).append(record)
    with drawing(path, *_size(settings, 2.4)) as figure:
        for axis, setting in zip(_panels(figure, settings, sharey=True), settings, strict=True):
            for method in methods:
                runs = groups.get((setting, method), [])
                if not runs:
                    continue
                length = min(len(r.kl) for r in runs)
                kl = np.mean([r.kl[:length] for r in runs], axis=0)
                gains = np.array([np.array(r.true_return[:length]) - r.reference_return for r in runs])
                low, middle = np.quantile(gains, [0.05, 0.5], axis=0)
                axis.plot(kl, middle, color=colour[method], linewidth=1.8, label=method)
                axis.plot(kl, low, color=colour[method], linewidth=1.4, linestyle=":")
            axis.axhline(0, color="black", linewidth=1, linestyle="--")
            axis.set_xlim(left=0)
        figure.supxlabel("KL from the reference, nats", fontsize=9.5)
        figure.supylabel("true return less the reference's", fontsize=9.5)
        handles, labels = axis.get_legend_handles_labels()
        title = "line: median; dotted: the worst 5% of the runs lie below"
        figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8.5, title=title)


def effects(found: Sequence[Outcome], rows: Sequence[dict[str, Any]], baseline: str, path: str | Path) -> None:
    """Draw variance ratio and risk with their intervals, setting by setting.

    Args:
        found: Outcomes at one point.
        rows: Comparisons with the baseline at that point.
        baseline: Its name.
        path: The PNG.
    """
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    methods = _names(found, "method")
    colour = colours(methods)
    step = 0.7 / len(methods)
    with drawing(path, 10.5, 1.5 + len(settings) * (0.16 + 0.13 * len(methods))) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for row in rows:
            y = settings.index(row["setting"]) + step * (methods.index(row["method"]) - (len(methods) - 1) / 2)
            ratio = row["variance_ratio"]
            if ratio is not None:
                ends = np.clip([ratio.low, ratio.high], 1e-3, 1e3)
                left.plot(ends, [y, y], color=colour[row["method"]], linewidth=1.4)
                left.plot(ratio.value, y, "o", color=colour[row["method"]], markersize=4)
        for outcome in found:
            if outcome.setting not in settings or not outcome.gains:
                continue
            risk = outcome.row()["risk"]
            y = settings.index(outcome.setting) + step * (methods.index(outcome.method) - (len(methods) - 1) / 2)
            right.plot([100 * risk.low, 100 * risk.high], [y, y], color=colour[outcome.method], linewidth=1.4)
            right.plot(100 * risk.value, y, "o", color=colour[outcome.method], markersize=4)
        left.axvline(1, color="black", linewidth=1, linestyle="--")
        left.set(xscale="log", xlabel=f"variance of {baseline} over the method's\n(right of 1: varies less)")
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if left.get_xlim()[0] <= t <= left.get_xlim()[1]]
        left.set_xticks(ticks, [f"{t:g}" for t in ticks])
        left.minorticks_off()
        right.set(xlabel="risk of ending worse than the reference, %\n(left: better)")
        left.set_yticks(range(len(settings)), settings, fontsize=8)
        left.set_ylim(len(settings) - 0.5, -0.5)
        for axis in (left, right):
            axis.grid(axis="y", visible=False)
            for edge in np.arange(0.5, len(settings) - 1):
                axis.axhline(edge, color="#e6e8eb", linewidth=0.8)
        shown = [m for m in methods if any(o.method == m and o.setting in settings for o in found)]
        handles = [mpl.lines.Line2D([], [], color=colour[m], marker="o", markersize=4) for m in shown]
        figure.legend(handles, shown, loc="outside upper center", ncols=3, fontsize=8.5)
