"""An evaluation as files, each written whole or not at all: figures as JSON and CSV, pairs as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_vapo.evaluation.preference_report import PreferenceReport
from lit_vapo.folders import write_whole
from lit_vapo.types import RewardEstimate

FIGURES = ("accuracy", "nll", "ece", "brier")


def evaluation(
    report: PreferenceReport,
    temperature: Mapping[str, float] | None = None,
    ood: float | None = None,
    subsets: Sequence[Mapping[str, Any]] | None = None,
    verdict: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All figures of an evaluation as one record; NaN stands where a figure is not defined.

    Args:
        report: The evaluation.
        temperature: From `temperature_report`.
        ood: AUROC of σ against another data set.
        subsets: From `subset_table`.
        verdict: From `verdict`.

    Returns:
        `mean` and `members` (accuracy, nll, ece, brier), `num_pairs`, `num_ties`, `uncertainty`, and `temperature`,
        `ood_auroc`, `subsets`, `verdict` where they were given.
    """
    rows = [{name: float(getattr(report, name)[k]) for name in FIGURES} for k in range(report.num_members + 1)]
    curve = report.risk_coverage
    record: dict[str, Any] = {
        "mean": rows[-1],
        "members": rows[:-1],
        "num_pairs": report.num_pairs,
        "num_ties": report.num_ties,
        "uncertainty": {
            "disagreement": float(report.disagreement),
            "margin_sigma": float(report.margin_sigma.mean()),
            **report.noise,
            "sigma_constant_share": float(report.constant_share),
            "error_auroc": float(report.error_auroc),
            "error_spearman": float(report.error_spearman),
            "aurc": float(curve.area),
            "best_aurc": float(curve.best_area),
        },
    }
    if temperature is not None:
        record["temperature"] = dict(temperature)
    if ood is not None:
        record["ood_auroc"] = ood
    if subsets is not None:
        record["subsets"] = [dict(row) for row in subsets]
    if verdict is not None:
        record["verdict"] = dict(verdict)
    return record


def write_report(folder: str | Path, report: PreferenceReport, record: Mapping[str, Any]) -> list[Path]:
    """Write `evaluation.json`, `evaluation.csv` (a row for each member, and the mean) and `pairs.csv`.

    The same evaluation gives the same bytes. What is not defined (NaN) is null in JSON and an empty field in CSV.

    Args:
        folder: Where to; made if need be.
        report: The evaluation.
        record: Its figures, from `evaluation`.

    Returns:
        The three paths.
    """
    folder = Path(folder)
    paths = [folder / name for name in ("evaluation.json", "evaluation.csv", "pairs.csv")]
    write_json(paths[0], record)

    members = range(report.num_members)
    rows = zip([*members, "mean"], [*record["members"], record["mean"]], strict=True)
    write_csv(paths[1], ["member", *FIGURES], [[name, *row.values()] for name, row in rows])

    names = ["example_id", "margin_mean", "margin_sigma", "chosen_sigma", "rejected_sigma"]
    columns = [report.example_ids, report.margin.mean, report.margin_sigma, *report.response_sigma.T]
    if report.noise:
        names += ["chosen_noise", "rejected_noise"]
        columns += report.response_noise.T
    if report.margin.members is not None:
        columns += report.margin.members.T
    pairs = zip(*(column.tolist() for column in columns), strict=True)
    write_csv(paths[2], [*names, *(f"margin_member_{k}" for k in members)], pairs)
    return paths


def write_scores(
    path: str | Path, estimate: RewardEstimate, places: Sequence[str], sides: Sequence[str], texts: Sequence[str]
) -> None:
    """Write the normalised scores of N responses as a table.

    Args:
        path: The CSV file.
        estimate: Their estimate.
        places: Where each response comes from.
        sides: Which of its pair it is.
        texts: The responses.
    """
    columns = [estimate.mean, estimate.sigma]
    members = [] if estimate.members is None else list(estimate.members.T)
    names = ["place", "side", "reward", "sigma", *(f"member_{k}" for k in range(len(members))), "response"]
    numbers = [column.tolist() for column in [*columns, *members]]
    write_csv(Path(path), names, zip(places, sides, *numbers, texts, strict=True))


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record; what is not defined (NaN) is null."""
    write_whole(path, json.dumps(_without_nan(dict(record)), indent=2, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    """Put None for every number that JSON cannot say."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: Path, header: list[str], rows: Any) -> None:
    """Write a table; numbers to seven digits, which is what single precision holds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        cells = (_without_nan(cell) for cell in row)
        writer.writerow([f"{cell:.7g}" if isinstance(cell, float) else cell for cell in cells])
    write_whole(path, text.getvalue())
