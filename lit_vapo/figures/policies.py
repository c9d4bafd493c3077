"""Pictures of a policy: what it gains, and what it only seems to gain, on its way from the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.patheffects import withStroke

from lit_vapo.figures.drawing import BLUE, GREY, ORANGE, drawing

Evaluations = Sequence[Mapping[str, Any]]
# Name of a score -> its mean among the figures of an evaluation, what it is called, its colour.
SCORES = {"reward": ("reward_mean", "ensemble's mean", ORANGE), "gold": ("gold", "gold", BLUE)}
SHARE, VIOLET = "outlier_share", "#CC79A7"
SHOWN = 7


class _Curve(NamedTuple):
    """One score of several evaluations: √KL, gains and their errors in deviations of the reference, and raw."""

    x: list[float]
    y: list[float]
    errors: list[float]
    raw: list[float]


def overoptimisation(
    path: str | Path,
    course: Evaluations,
    test: Evaluations = (),
    best_of_n: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Draw how ensemble and judge see the policy as it moves away: gains over the reference against √KL.

    Both scores are in standard deviations over the reference's responses, which makes them comparable: where the
    ensemble still rises and gold no longer does, the policy learns the ensemble's mistakes. The band is what the single
    members see. Below, if there is an alarm, how many responses are unlike the reference's. Axes after Gao, Schulman &
    Hilton, arXiv 2210.10760, figure 1; KL by k1, below zero drawn as zero.

    Args:
        path: The PNG.
        course: Evaluations as rows of `evaluations.csv`, the reference's first; may be empty.
        test: The reference's and the policy's row of a test; may be empty.
        best_of_n: `kl_bound`, `reward` and (with a judge) `gold` of the reference's best of n in the test.

    Raises:
        ValueError: There is nothing to draw.
    """
    if not course and not test:
        raise ValueError("expected evaluations to draw, got none")
    watched = [row for row in course if not math.isnan(row.get(SHARE, math.nan))]
    with drawing(path, 6.4, 6.2 if watched else 4.3) as figure:
        axis, *below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1]) if watched else [figure.subplots()]
        if watched:
            _draw_alarm(below[0], watched)
        axis.axhline(0, color=GREY, linewidth=1)
        legend = [artist for name in SCORES for artist in _draw_score(axis, name, course, test, best_of_n)]
        if len(course) > 1:
            _number(axis, course)
        axis.plot([0], [0], "o", color="white", markeredgecolor="black", markersize=7, zorder=6)
        axis.annotate("reference", (0, 0), (5, -14), textcoords="offset points", fontsize=8.5)
        axis.set(
            title="What the policy gains as it moves away",
            ylabel="gain over the reference ± standard error\n(standard deviations of its responses)",
        )
        bottom, top = axis.get_ylim()
        axis.set_xlim(left=-0.02 * axis.get_xlim()[1])
        axis.set_ylim(min(bottom, -0.08 * top), top)
        axis.legend(handles=legend, loc="best", fontsize=8.5)
        (below or [axis])[-1].set_xlabel("√KL from the reference (KL in nats per response)")


def _draw_alarm(axis: Any, rows: Evaluations) -> None:
    """Draw how many responses are unlike the reference's, and how much more members disagree about them."""
    x, shares = [_distance(row) for row in rows], [100 * row[SHARE] for row in rows]
    legend = axis.plot(x, shares, "o-", color=VIOLET, markersize=4, linewidth=2, label="unlike the reference's")
    if rows[0]["policy"] == "reference":
        axis.axhline(shares[0], color=VIOLET, linestyle="--", linewidth=1)
    axis.set_ylabel("outliers (%)")
    axis.set_ylim(bottom=-0.04 * max(shares))
    doubts = [row.get("relative_sigma", math.nan) for row in rows]
    if not any(map(math.isnan, doubts)):
        right = axis.twinx()
        right.grid(visible=False)
        right.set_ylabel("σ, reference = 1")
        legend += right.plot(x, doubts, "s:", color=GREY, markersize=3, label="members' disagreement")
    axis.legend(handles=legend, loc="best", fontsize=8.5)


def _draw_score(
    axis: Any, name: str, course: Evaluations, test: Evaluations, best_of_n: Mapping[str, Sequence[float]] | None
) -> list[Any]:
    """Draw one score; what the legend should name."""
    _, title, color = SCORES[name]
    runs, tested = _curve(name, course), _curve(name, test)
    legend = []
    if runs is not None:
        label = f"{title}: {runs.raw[0]:.2f} → {runs.raw[-1]:.2f}"
        options: dict[str, Any] = {"color": color, "markersize": 4, "linewidth": 2, "elinewidth": 1}
        legend.append(axis.errorbar(runs.x, runs.y, runs.errors, fmt="o-", label=label, **options))
        if name == "reward" and (band := _band(course)) is not None:
            legend.append(axis.fill_between(runs.x, *band, color=color, alpha=0.15, linewidth=0, label="its members"))
    if tested is not None:
        label = f"{title}, test: {tested.raw[0]:.2f} → {tested.raw[-1]:.2f}"
        point = ([column[-1]] for column in tested[:3])
        options = {"color": color, "markersize": 13, "markeredgecolor": "white", "zorder": 5}
        legend.append(axis.errorbar(*point, fmt="*", label=label, **options))
        if best_of_n is not None and name in best_of_n:
            x = [math.sqrt(kl) for kl in best_of_n["kl_bound"]]
            y = [(value - tested.raw[0]) / _scale(name, test[0]) for value in best_of_n[name]]
            label = f"{title}, reference's best of {len(x)}"
            legend += axis.plot(x, y, ":", color=color, linewidth=1.8, label=label)
    return legend


def _curve(name: str, rows: Evaluations) -> _Curve | None:
    """The curve of a score; None where nobody gave it."""
    mean = SCORES[name][0]
    if not rows or math.isnan(rows[0].get(mean, math.nan)):
        return None
    known = [row for row in rows if not math.isnan(row.get(mean, math.nan))]
    scale, start = _scale(name, known[0]), known[0][mean]
    errors = [row.get(f"{name}_gain_se", math.nan) for row in known]
    return _Curve(
        [_distance(row) for row in known],
        [(row[mean] - start) / scale for row in known],
        [0.0 if math.isnan(error) else error / scale for error in errors],
        [row[mean] for row in known],
    )


def _distance(row: Mapping[str, Any]) -> float:
    return math.sqrt(max(0.0, row["kl_k1"]))


def _scale(name: str, reference: Mapping[str, Any]) -> float:
    """Standard deviation of the reference's scores; 1 where they are all the same."""
    return reference.get(f"{name}_std") or 1.0


def _band(rows: Evaluations) -> tuple[list[float], list[float]] | None:
    """Least and largest gain of any member that is logged, by evaluation; None where there are no two."""
    names = [name for name in rows[0] if name.startswith("reward_member_")]
    if len(names) < 2:
        return None
    scale = _scale("reward", rows[0])
    gains = [[(row[name] - rows[0][name]) / scale for name in names] for row in rows]
    return [min(gain) for gain in gains], [max(gain) for gain in gains]


def _number(axis: Any, course: Evaluations) -> None:
    """Write the iteration beside some of the evaluations, the last among them."""
    curve = _curve("reward", course)
    assert curve is not None
    last = len(course) - 1
    halo = [withStroke(linewidth=2.5, foreground="white")]
    options: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "zorder": 7, "path_effects": halo}
    for i in range(last, 0, -max(1, math.ceil(last / SHOWN))):
        where, number = (curve.x[i], curve.y[i]), course[i]["iteration"]
        if i == last:
            axis.annotate(f"iteration {number}", where, (-6, 6), ha="right", **options)
        else:
            axis.annotate(str(number), where, (-4, 5), ha="right", **options)
