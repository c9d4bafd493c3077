"""What an evaluation of a reward ensemble comes to, as a few figures and in plain words."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lit_vapo.evaluation.preference_report import PreferenceReport
from lit_vapo.functional import Interval, auroc_interval, share_interval

# Fewer errors than these say nothing about σ.
FEW_ERRORS = 10
# A share of σ² that is one constant per member, above which σ² says little else.
LARGE_CONSTANT = 0.2
# An effect as large as the spread of content.
LARGE_EFFECT = 1.0


@dataclass
class Findings:
    """The figures of a verdict; NaN where one is not defined.

    Attributes:
        num_pairs: Held-out pairs, ties left out.
        accuracy: Share of them that the mean of the members gets right.
        accuracy_interval: Its 95% interval.
        longer_rewarded: Share of pairs of unequal length in which the longer response has the higher reward.
        longer_chosen: Share of them in which people chose the longer one.
        length_correlation: Correlation over pairs of the differences in reward and in length.
        cut_effect: By how much cutting a response in half changes its reward, in standard deviations of the reward over
            whole responses.
        num_errors: Pairs that the mean gets wrong.
        error_auroc: How often σ is larger on a pair that the mean gets wrong than on one it gets right.
        error_auroc_interval: Its 95% interval.
        sigma_constant_share: Share of σ² that is one constant for each member.
    """

    num_pairs: int
    accuracy: float
    accuracy_interval: Interval
    longer_rewarded: float
    longer_chosen: float
    length_correlation: float
    cut_effect: float
    num_errors: int
    error_auroc: float
    error_auroc_interval: Interval
    sigma_constant_share: float


def find(
    report: PreferenceReport,
    lengths: Tensor | None = None,
    cut: tuple[Tensor, Tensor] | None = None,
    calibrated: bool = True,
) -> Findings:
    """The figures.

    Args:
        report: An evaluation of at least one pair.
        lengths: Tokens of the chosen and of the rejected response of each pair (N, 2), if known.
        cut: Rewards of some whole responses (M,) and of the same ones cut in half (M,), if known.
        calibrated: Whether members are comparable; else their constants say nothing.
    """
    accuracy, count = float(report.accuracy[-1]), report.num_pairs
    longer_rewarded = longer_chosen = correlation = math.nan
    if lengths is not None:
        difference = (lengths[:, 0] - lengths[:, 1]).float()
        unequal = difference != 0
        if bool(unequal.any()):
            sides = torch.sign(report.margin.mean * difference)[unequal]
            longer_rewarded = float(0.5 + 0.5 * sides.mean())
            longer_chosen = float((difference > 0)[unequal].float().mean())
        correlation = _correlation(report.margin.mean, difference)
    wrong, right = int((report.error == 1).sum()), int((report.error == 0).sum())
    area = float(report.error_auroc)
    unknown = Interval(math.nan, math.nan)
    return Findings(
        count,
        accuracy,
        share_interval(accuracy, count),
        longer_rewarded,
        longer_chosen,
        correlation,
        math.nan if cut is None else _effect(*cut),
        wrong,
        area,
        auroc_interval(area, wrong, right) if wrong and right else unknown,
        float(report.constant_share) if calibrated else math.nan,
    )


def _correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation around zero, the mean of a difference whose sides have no order."""
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / scale) if float(scale) > 0 else math.nan


def _effect(whole: Tensor, cut: Tensor) -> float:
    """Mean change in standard deviations over the whole ones."""
    spread = float(whole.std()) if len(whole) > 1 else 0.0
    return float((cut - whole).mean()) / spread if spread > 0 else math.nan


def verdict(findings: Findings) -> dict[str, Any]:
    """The figures with their sentences, as a record for JSON."""
    return {**asdict(findings), "sentences": sentences(findings)}


def sentences(f: Findings) -> list[str]:
    """What the figures come to: one sentence for each, and what to try where the answer is bad."""
    return [text for part in (_accuracy(f), _length(f), _cut(f), _errors(f), _constant(f)) for text in part]


def _within(interval: Interval, form: str = ".0%") -> str:
    return f"95% interval {interval.low:{form}} to {interval.high:{form}}"


def _accuracy(f: Findings) -> list[str]:
    seen = f"right on {f.accuracy:.0%} of {f.num_pairs} held-out pairs ({_within(f.accuracy_interval)})"
    if f.accuracy_interval.low > 0.5:
        return [f"Better than a coin: {seen}."]
    return [
        f"WARNING: not shown to be better than a coin: {seen}.",
        "Try more pairs, a larger base model, or more pairs to test on (data.test_fraction).",
    ]


def _length(f: Findings) -> list[str]:
    if math.isnan(f.longer_rewarded):
        return []
    seen = (
        f"the longer response has the higher reward in {f.longer_rewarded:.0%} of pairs, and people chose it in "
        f"{f.longer_chosen:.0%} (correlation of reward with length {f.length_correlation:+.2f})"
    )
    interval = share_interval(f.longer_rewarded, f.num_pairs)
    if interval.low <= f.longer_chosen <= interval.high:
        return [f"Length: {seen}."]
    other = "shorter" if f.longer_rewarded > f.longer_chosen else "longer"
    return [
        f"WARNING: length moves the reward more than people's choices do: {seen}.",
        f"Try more pairs whose {other} response was chosen, and watch response_length in PPO.",
    ]


def _cut(f: Findings) -> list[str]:
    if math.isnan(f.cut_effect):
        return []
    seen = f"cutting a response in half changes its reward by {f.cut_effect:+.2f} standard deviations of content"
    if abs(f.cut_effect) < LARGE_EFFECT:
        return [f"Ending: the token that ends a response is not read, and {seen}."]
    return [
        f"WARNING: a reward says whether a text is finished, more than how good it is: {seen}.",
        "Try model.pooling=mean and another model.layer; in PPO a larger sampling.max_new_tokens.",
    ]


def _errors(f: Findings) -> list[str]:
    if min(f.num_errors, f.num_pairs - f.num_errors) < FEW_ERRORS:
        return [f"Errors: {f.num_errors} of {f.num_pairs} are too few to say whether σ tells them."]
    seen = f"AUROC {f.error_auroc:.2f}, {_within(f.error_auroc_interval, '.2f')}, {f.num_errors} errors"
    if f.error_auroc_interval.low > 0.5:
        return [f"σ is larger where the ensemble errs ({seen})."]
    return [
        f"WARNING: σ does not tell the ensemble's errors ({seen}).",
        "Expect little of a variance-aware objective here; try more members or LoraEnsemble, and compare MeanReward.",
    ]


def _constant(f: Findings) -> list[str]:
    if math.isnan(f.sigma_constant_share):
        return []
    seen = f"{f.sigma_constant_share:.0%} of σ² is one constant for each member"
    if f.sigma_constant_share <= LARGE_CONSTANT:
        return [f"Members: {seen}, the rest is about the responses."]
    return [
        f"WARNING: members differ by constants rather than about responses: {seen}.",
        "Try `lit-vapo reward calibrate` with a reference and prompts like those of PPO, and more model.num_reference.",
    ]
