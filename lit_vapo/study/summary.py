"""What a study found: every method at every point, every pair compared, and a verdict for each claim."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lit_vapo.study.experiment import Analysis, Record
from lit_vapo.study.statistics import (
    ALPHA,
    Comparison,
    Interval,
    VarianceComparison,
    compare_means,
    compare_risks,
    compare_variances,
    holm,
    mean_interval,
    needed_for_risk,
    needed_for_variance,
    risk_interval,
)

HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided at this sample size"
FINAL = "final"
EXACT = "exact_risk"  # a record carries it where a formula gives the risk


class Outcome(NamedTuple):
    """One method at one point of one setting.

    Attributes:
        setting: Name of the setting.
        point: `final`, or a KL as `KL 0.1`.
        method: Name of the method.
        gains: True return less the reference's by repetition, of those that reach the point.
        kl: Mean KL divergence there, in nats.
        unreached: How many repetitions never reach it.
    """

    setting: str
    point: str
    method: str
    gains: dict[int, float]
    kl: float
    unreached: int

    def row(self) -> dict[str, Any]:
        """Its figures."""
        gains = np.array(list(self.gains.values()))
        row: dict[str, Any] = {"setting": self.setting, "point": self.point, "method": self.method, "n": len(gains)}
        row |= {"unreached": self.unreached, "kl": self.kl}
        if len(gains):
            row |= {"gain": mean_interval(gains), "sd": float(gains.std(ddof=1)) if len(gains) > 1 else 0.0}
            row["risk"] = risk_interval(gains < 0)
        return row


class Pair(NamedTuple):
    """One method beside a baseline at one point of one setting.

    Attributes:
        method: The method's outcome.
        baseline: The baseline's.
        n: Repetitions in which both reach the point.
        mean: How much larger the method's mean true return is.
        variance: How the variances compare.
        risk: By how much the method's risk is lower.
        needed_variance: Repetitions that the seen effect on the variance needs.
        needed_risk: The same for the risk.
    """

    method: Outcome
    baseline: Outcome
    n: int
    mean: Comparison
    variance: VarianceComparison
    risk: Comparison
    needed_variance: int | None
    needed_risk: int | None


def _by_method(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """The runs of each method in each setting, in order."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.setting, record.method), []).append(record)
    return groups


def outcomes(records: Iterable[Record], analysis: Analysis) -> list[Outcome]:
    """Every method at every point of every setting, in order."""
    found = []
    for (setting, method), runs in _by_method(records).items():
        final = {r.repetition: r.gain for r in runs}
        kl = float(np.mean([r.kl[r.final] for r in runs]))
        found.append(Outcome(setting, FINAL, method, final, kl, 0))
        for level in analysis.kl:
            reached = {r.repetition: gain for r in runs if (gain := r.gain_at(level)) is not None}
            found.append(Outcome(setting, f"KL {level:g}", method, reached, level, len(runs) - len(reached)))
    return found


def pairs(found: Sequence[Outcome], analysis: Analysis) -> list[Pair]:
    """Every method beside every baseline of its setting, at every point that two repetitions or more reach in both.

    Raises:
        ValueError: A baseline is no method of any setting.
    """
    unknown = [name for name in analysis.baselines if name not in {outcome.method for outcome in found}]
    if unknown:
        names = ", ".join(dict.fromkeys(repr(outcome.method) for outcome in found))
        raise ValueError(f"analysis.baselines: expected some of the methods {names}, got {unknown[0]!r}")
    places: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in found:
        places.setdefault((outcome.setting, outcome.point), []).append(outcome)
    wanted = [pair for place in places.values() for pair in _chosen(place, analysis.baselines)]
    shared = [(m, b, sorted(m.gains.keys() & b.gains.keys())) for m, b in wanted]
    shared = [(m, b, both) for m, b, both in shared if len(both) > 1]
    # Enough for the first and strictest step of Holm's correction.
    strict = ALPHA / max(1, len(shared))
    made = []
    for method, baseline, both in shared:
        a, b = (np.array([outcome.gains[n] for n in both]) for outcome in (method, baseline))
        effects = compare_means(a, b), compare_variances(a, b), compare_risks(a < 0, b < 0)
        needed = needed_for_variance(a, b, strict), needed_for_risk(a < 0, b < 0, strict)
        made.append(Pair(method, baseline, len(both), *effects, *needed))
    return made


def _chosen(place: list[Outcome], baselines: list[str]) -> Iterable[tuple[Outcome, Outcome]]:
    """Method and baseline of each comparison; two baselines are compared once, the later with the earlier."""
    by_name = {outcome.method: outcome for outcome in place}
    base = [name for name in baselines if name in by_name] or sorted(by_name)[:1]
    for i, baseline in enumerate(base):
        for method in by_name.values():
            if method.method not in base[: i + 1]:
                yield method, by_name[baseline]


def verdict(effect: Interval | None, none: float, smallest: float, p: float) -> str:
    """Whether an effect holds, does not, or is undecided.

    It holds where the corrected test rejects and the whole interval is on the right side of no effect: the test of the
    variance looks at distances from the median, and may reject where the ratio says nothing, or even the opposite. It
    does not hold where the whole interval lies below the smallest effect worth having, as on the wrong side.

    Args:
        effect: The effect with its interval; larger is better.
        none: The value that says no effect.
        smallest: The smallest value worth having.
        p: Corrected p-value.
    """
    if effect is None:
        return OPEN
    if p < ALPHA and effect.low > none:
        return HOLDS
    return FAILS if effect.high < smallest else OPEN


def compare(found: Sequence[Outcome], analysis: Analysis) -> list[dict[str, Any]]:
    """All comparisons with corrected p-values and verdicts, one row for each pair, point and setting."""
    made = pairs(found, analysis)
    # One family for each claim: all comparisons of the study.
    p_variance = holm([pair.variance.paired_p for pair in made])
    p_risk = holm([pair.risk.p for pair in made])
    rows = []
    for pair, p_v, p_r in zip(made, p_variance, p_risk, strict=True):
        ratio, reduction = pair.variance.ratio, pair.risk.effect
        rows.append(
            {
                "setting": pair.method.setting,
                "point": pair.method.point,
                "method": pair.method.method,
                "baseline": pair.baseline.method,
                "n": pair.n,
                "gain_difference": pair.mean.effect,
                "gain_difference_p": pair.mean.p,
                "variance_ratio": ratio,
                "f_p": pair.variance.f_p,
                "levene_p": pair.variance.levene_p,
                "paired_p": pair.variance.paired_p,
                "paired_p_holm": p_v,
                "variance_verdict": verdict(ratio, 1.0, analysis.smallest_ratio, p_v),
                "variance_needs": pair.needed_variance,
                "risk_reduction": reduction,
                "mcnemar_p": pair.risk.p,
                "mcnemar_p_holm": p_r,
                "risk_verdict": verdict(reduction, 0.0, analysis.smallest_risk, p_r),
                "risk_needs": pair.needed_risk,
            }
        )
    return rows


def formulas(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Seen risk beside the exact one, where records carry it in their `extra`.

    Returns:
        A row for each setting and method: `exact`, `seen`, `standard_error` (of the exact risk at this number of
        repetitions), `z` (their distance in standard errors).
    """
    rows = []
    for (setting, method), runs in _by_method(r for r in records if EXACT in r.extra).items():
        exact, seen = runs[0].extra[EXACT], float(np.mean([r.gain < 0 for r in runs]))
        error = max((exact * (1 - exact) / len(runs)) ** 0.5, 1e-12)
        rows.append(
            {
                "setting": setting,
                "method": method,
                "n": len(runs),
                "exact": exact,
                "seen": seen,
                "standard_error": error,
                "z": (seen - exact) / error,
            }
        )
    return rows


def further(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Means over repetitions of what else records carry, a row for each setting and method that has any."""
    rows = []
    for (setting, method), runs in _by_method(records).items():
        names = dict.fromkeys(name for run in runs for name in run.extra if name != EXACT)
        means = {name: float(np.mean([run.extra[name] for run in runs if name in run.extra])) for name in names}
        rows += [{"setting": setting, "method": method} | means] if means else []
    return rows


def sentences(rows: Sequence[dict[str, Any]], formula_rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each claim: whether it holds, does not hold, or is undecided, and in which settings."""
    found = []
    if formula_rows:
        worst = max(abs(row["z"]) for row in formula_rows)
        state = HOLDS if worst <= 3 else FAILS
        found.append(
            f"The risk formulas agree with simulation within 3 standard errors: {state} "
            f"({len(formula_rows)} risks, largest distance {worst:.1f} standard errors)."
        )
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["baseline"]), []).append(row)
    claims = (
        ("varies less than", "variance_ratio", "ratio", "variance_verdict"),
        ("ends worse than the reference less often than", "risk_reduction", "reduction", "risk_verdict"),
    )
    for (method, baseline), group in groups.items():
        for words, key, name, verdict_key in claims:
            points = {point: [row for row in group if row["point"] == point] for point in _points(group)}
            parts = [f"{_place(point)} {_verdicts(here, key, name, verdict_key)}" for point, here in points.items()]
            found.append(f"**{method}** {words} **{baseline}**: {'; '.join(parts)}.")
    return found


def _points(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["point"] for row in rows))


def _place(point: str) -> str:
    return "with its final policy this" if point == FINAL else f"at a {point.replace('KL', 'KL of')} it"


def _verdicts(group: Sequence[dict[str, Any]], key: str, name: str, verdict_key: str) -> str:
    """Verdicts over the settings in words, with the range of the effect."""
    values = [row[key].value for row in group if row[key] is not None]
    if len(group) == 1 and values:
        effect = group[0][key]
        of = f"95% {effect.low:.3g} to {effect.high:.3g}, {group[0]['n']} pairs"
        return f"{_said(group[0][verdict_key])} ({name} {effect.value:.3g}, {of})"
    counts = {state: sum(row[verdict_key] == state for row in group) for state in (HOLDS, FAILS, OPEN)}
    parts = [f"{_said(state)} in {count} of {len(group)} settings" for state, count in counts.items() if count]
    spread = f" ({name} {min(values):.3g} to {max(values):.3g})" if values else ""
    return ", ".join(parts) + spread


def _said(state: str) -> str:
    return f"is {state}" if state == OPEN else state
