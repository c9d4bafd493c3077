"""What a test on preference pairs comes to, whoever scored them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_vapo.evaluation.preference_files import evaluation
from lit_vapo.evaluation.preference_report import PreferenceReport
from lit_vapo.evaluation.preference_tables import ood_auroc, subset_table, temperature_report
from lit_vapo.evaluation.verdict import find, verdict

PairRows = Sequence[Mapping[str, Any]]
# Rewards of some responses, whole and cut in half.
Cut = tuple[Tensor, Tensor] | None


def tested(
    reports: Mapping[str, PreferenceReport], rows: PairRows | None, cut: Cut, calibrated: bool
) -> dict[str, Any]:
    """All figures of a test as one record (see `evaluation`).

    Args:
        reports: Of the splits: `test`; `val`, on which a temperature is fitted, and `ood`, if there are such.
        rows: Tokenised pairs of `test`, or None where nobody knows them.
        cut: Rewards of some of their responses, whole and cut in half, if anybody knows them.
        calibrated: Whether members are centred and scaled.
    """
    report = reports["test"]
    temperature = None
    if "val" in reports and reports["val"].num_pairs and report.num_pairs:
        temperature = temperature_report(reports["val"], report)
    ood = float(ood_auroc(report, reports["ood"])) if "ood" in reports else None
    said = said_of(report, rows, cut, calibrated) if report.num_pairs else None
    return evaluation(report, temperature, ood, _subsets(report, rows), said)


def said_of(report: PreferenceReport, rows: PairRows | None, cut: Cut, calibrated: bool) -> dict[str, Any]:
    """The verdict on the pairs of one split; arguments as in `tested`."""
    lengths = None
    if rows is not None:
        found = _in_order(report, rows)
        whole = torch.tensor([[len(row["chosen_ids"]), len(row["rejected_ids"])] for row in found])
        lengths = whole - torch.tensor([[row["prompt_length"]] for row in found])
    return verdict(find(report, lengths, cut, calibrated))


def _subsets(report: PreferenceReport, rows: PairRows | None) -> list[dict[str, Any]] | None:
    names = [row["subset"] for row in _in_order(report, rows or ())]
    return subset_table(report, [name or "none" for name in names]) if any(names) else None


def _in_order(report: PreferenceReport, rows: PairRows) -> list[Mapping[str, Any]]:
    """The rows of a report's pairs, in its order; none of no rows."""
    known = {row["example_id"]: row for row in rows}
    return [known[identity] for identity in report.example_ids.tolist()] if known else []
