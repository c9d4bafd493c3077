"""Figures that compare evaluations or parts of one: subsets, temperature, another data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_vapo.evaluation.preference_report import PreferenceReport
from lit_vapo.functional import auroc, fit_temperature
from lit_vapo.types import RewardEstimate


def subset_table(report: PreferenceReport, names: Sequence[str]) -> list[dict[str, Any]]:
    """Figures of the mean on each subset of the pairs, by name, and on `all` of them, last.

    Args:
        report: An evaluation.
        names: The subset of each pair, in the order of `report.example_ids`.

    Returns:
        One row for each subset: `subset`, `num_pairs`, `accuracy`, `nll`, `ece`, `sigma` (mean σ of the margin),
        `response_sigma` and `response_noise` where the estimator tells noise of labels (mean σ of a response's
        normalised reward over members, and over people) and `auroc` (σ of the margin against errors; NaN on a subset
        without errors, or with nothing else).

    Raises:
        ValueError: if there is not one name for each pair.

    Examples:
        >>> from lit_vapo.functional import ensemble_estimate
        >>> margin = ensemble_estimate(torch.tensor([[1.0, 3.0], [2.0, -4.0], [1.0, 1.0]]))
        >>> report = PreferenceReport(torch.tensor([3, 5, 8]), margin, torch.zeros(3, 2))
        >>> [(r["subset"], r["num_pairs"], r["accuracy"]) for r in subset_table(report, ["chat", "code", "code"])]
        [('chat', 1, 1.0), ('code', 2, 0.5), ('all', 3, 0.6666666865348816)]
    """
    if len(names) != report.num_pairs:
        raise ValueError(f"expected names of {report.num_pairs} pairs, got {len(names)}")
    parts = {name: report.select(torch.tensor([n == name for n in names])) for name in sorted(set(names))}
    return [_subset_row(name, part) for name, part in parts.items()] + [_subset_row("all", report)]


def _subset_row(name: str, part: PreferenceReport) -> dict[str, Any]:
    return {
        "subset": name,
        "num_pairs": part.num_pairs,
        "accuracy": float(part.accuracy[-1]),
        "nll": float(part.nll[-1]),
        "ece": float(part.ece[-1]),
        "sigma": float(part.margin_sigma.mean()),
        **part.noise,
        "auroc": float(part.error_auroc),
    }


def temperature_report(validation: PreferenceReport, test: PreferenceReport) -> dict[str, float]:
    """Calibration of the mean margin before and after one temperature, fitted on other pairs.

    A temperature changes no preference: accuracy, AUROC and the risk–coverage curve stay.

    Args:
        validation: The pairs that the temperature is fitted on.
        test: The pairs that it is judged on.

    Returns:
        `temperature`; `nll`, `ece` and `brier` of the mean on `test`; and `nll_calibrated`, `ece_calibrated` and
        `brier_calibrated`, the same with margins divided by the temperature.

    Raises:
        ValueError: if one of the reports is empty.
    """
    for name, report in (("validation", validation), ("test", test)):
        if not report.num_pairs:
            raise ValueError(f"expected at least one pair that is not a tie in {name}, got none")
    temperature = fit_temperature(validation.margin.mean)
    scaled = RewardEstimate(test.margin.mean / temperature, test.margin.variance / temperature.square(), None)
    calibrated = PreferenceReport(test.example_ids, scaled, test.response_sigma.square())
    out = {"temperature": float(temperature)}
    for suffix, report in (("", test), ("_calibrated", calibrated)):
        out |= {f"{name}{suffix}": float(getattr(report, name)[-1]) for name in ("nll", "ece", "brier")}
    return out


def ood_auroc(inside: PreferenceReport, outside: PreferenceReport) -> Tensor:
    """How well σ of a response's normalised reward tells another data set from the one the ensemble knows.

    Both responses of every pair count, each by its own σ.

    Args:
        inside: Pairs like those the ensemble was trained on.
        outside: Pairs from elsewhere.

    Returns:
        `()`, in [0, 1]: how often a response from `outside` has a larger σ than one from `inside`. 0.5 where σ says
        nothing, as with one member; NaN where a report is empty.
    """
    sigma = torch.cat([inside.response_sigma.flatten(), outside.response_sigma.flatten()])
    if not len(sigma):
        return torch.tensor(torch.nan)
    return auroc(sigma, torch.arange(len(sigma)) >= inside.response_sigma.numel())
