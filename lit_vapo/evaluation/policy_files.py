"""Evaluations of policies as files: the course of a run as CSV, the figures of a test as JSON."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_vapo.evaluation.policy_report import PolicyReport, compare
from lit_vapo.evaluation.preference_files import write_csv

WHO = "policy"
COUNTS = ("iteration", "step")


def evaluation_row(policy: str, iteration: int, step: int, figures: Mapping[str, float]) -> dict[str, Any]:
    """A row of `evaluations.csv`.

    Args:
        policy: Who was evaluated: `policy` or `reference`.
        iteration: Iterations of training behind it.
        step: Weight updates behind it.
        figures: What was found.
    """
    return {WHO: policy, "iteration": iteration, "step": step, **figures}


def write_evaluations(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write evaluations as a table, in place of the one that is there.

    A figure that a row does not have, or that is not defined, is an empty field.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    # Whole: a run that is killed here must find its former evaluations when it is resumed.
    write_csv(Path(path), names, [[row.get(name, math.nan) for name in names] for row in rows])


def read_evaluations(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a table of evaluations; none if there is no such file."""
    if not Path(path).is_file():
        return []
    with Path(path).open(newline="", encoding="utf-8") as file:
        return [{name: _cell(name, text) for name, text in row.items()} for row in csv.DictReader(file)]


def _cell(name: str, text: str) -> Any:
    if name == WHO:
        return text
    return int(text) if name in COUNTS else float(text or "nan")


def policy_evaluation(policy: PolicyReport, reference: PolicyReport) -> dict[str, Any]:
    """All figures of a test as one record; NaN stands where a figure is not defined.

    Returns:
        `num_prompts`, `num_responses` (to each of them), `policy` and `reference` (the figures of each), `comparison`,
        and `best_of_n` (of each: `n`, `kl_bound`, and the expected `reward` and `gold`) where there are several
        responses to a prompt.
    """
    both = {"policy": policy, "reference": reference}
    record: dict[str, Any] = {"num_prompts": policy.num_prompts, "num_responses": policy.num_responses}
    record |= {name: report.summary() for name, report in both.items()}
    record["comparison"] = compare(policy, reference)
    if policy.num_responses > 1:
        record["best_of_n"] = {name: report.best_of_n_table() for name, report in both.items()}
    return record
