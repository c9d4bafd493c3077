"""The report of a study: one HTML page, one Markdown page, and `summary.json`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from lit_vapo.commands import markdown
from lit_vapo.folders import write_whole
from lit_vapo.pages import html
from lit_vapo.study.execution import Results, Study
from lit_vapo.study.figures import distributions, effects, mean_risk, return_against_kl
from lit_vapo.study.statistics import Interval
from lit_vapo.study.summary import Outcome, compare, formulas, further, outcomes, sentences

READING = (
    "Gain is the true return of the policy less the reference's; risk is the share of repetitions in which it is below "
    "zero. Intervals are at 95%. A claim holds where its test, corrected by Holm's method for all comparisons of this "
    "study, rejects at 5% and its whole interval is on the right side; it does not hold where the whole interval lies "
    "below the smallest effect worth having, as on the wrong side; else it is undecided. `needs` is how many "
    "repetitions would show the seen effect with a power of 80% at the level of the strictest step of the correction; "
    "it takes the seen effect for the true one. Where `analysis.window` is above 1, figures of a policy are means of "
    "that many points in a row, those of the final policy of the last. A run that never reaches a KL is left out: "
    "a method's gain and risk are then of its own runs, ratio and reduction of the pairs in which both reach it."
)


class Section(NamedTuple):
    """A part of the page.

    Attributes:
        title: Its heading.
        text: Paragraphs; a line that begins with `- ` is a point of a list.
        table: Rows of cells, the header first; empty for none.
        pictures: Titles and files.
    """

    title: str
    text: list[str]
    table: list[list[str]]
    pictures: Mapping[str, Path]

    @property
    def paragraphs(self) -> list[tuple[bool, list[str]]]:
        """Lines of the text that stand together, and whether they are points of a list."""
        shown = [line for line in self.text if line and not line.startswith("    ")]
        return [
            (listed, [line.removeprefix("- ") for line in lines])
            for listed, lines in groupby(shown, key=lambda line: line.startswith("- "))
        ]

    @property
    def code(self) -> str:
        """What is indented."""
        return "\n".join(line[4:] for line in self.text if line.startswith("    "))


def report(study: Study, config: Mapping[str, Any], results: Results) -> list[str]:
    """Write `report.html`, `report.md`, `pictures/` and `summary.json` into the study's folder.

    Args:
        study: The study.
        config: Its configuration.
        results: What is known of it.

    Returns:
        A sentence for each claim.

    Raises:
        ValueError: No repetition is finished.
    """
    if not results.records:
        raise ValueError(
            f"output: {study.output!r} has no finished repetition, but {len(results.failures)} that failed"
        )
    results = results._replace(records=[r.smoothed(study.analysis.window) for r in results.records])
    found = outcomes(results.records, study.analysis)
    methods, rows, exact = [o.row() for o in found], compare(found, study.analysis), formulas(results.records)
    more = further(results.records)
    claims = sentences(rows, exact)
    state = _state(study, results)
    summary = {
        "config": config,
        "versions": results.versions,
        "state": state,
        "claims": claims,
        "methods": methods,
        "comparisons": rows,
        "formulas": exact,
        "further": more,
        "failures": results.failures,
    }
    folder = Path(study.output)
    write_whole(folder / "summary.json", _json(_plain(summary)))
    pictures = _draw(results, found, rows, folder / "pictures")
    sections = [
        Section("What is claimed, and does it hold", [READING, "", *(f"- {claim}" for claim in claims)], [], {}),
        Section("State of the study", [f"- {line}" for line in state], [], {}),
        *([Section("Risk formulas beside simulation", [], _table(exact), {})] if exact else []),
        *(Section(title, [], [], shown) for title, shown in pictures.items()),
        Section("Every method", [], _table(methods), {}),
        Section("Every comparison", [], _table(rows), {}),
        *([Section("Further figures, means over repetitions", [], _table(more), {})] if more else []),
        Section("Configuration", [f"    {line}" for line in json.dumps(config, indent=2).splitlines()], [], {}),
    ]
    write_whole(folder / "report.md", _markdown(folder.name, sections))
    write_whole(folder / "report.html", _html(folder.name, sections))
    return claims


def _state(study: Study, results: Results) -> list[str]:
    """What is finished, what failed and what is missing, in words."""
    total = study.repetitions * len(study.experiment.settings)
    missing = {setting: n for setting, n in results.missing.items() if n}
    finished = total - len(results.failures) - sum(missing.values())
    lines = [f"{finished} of {total} repetitions finished ({study.repetitions} in each setting), seed {study.seed}."]
    if missing:
        lines.append(f"Missing: {', '.join(f'{n} of {setting}' for setting, n in missing.items())}.")
    lines += [f"Failed: {f['setting']}, repetition {f['repetition']}: {f['error']}" for f in results.failures]
    if len(results.versions) > 1:
        lines.append(f"Made with {len(results.versions)} different sets of package versions: see summary.json.")
    return lines


def _draw(
    results: Results, found: Sequence[Outcome], rows: Sequence[dict[str, Any]], folder: Path
) -> dict[str, dict[str, Path]]:
    """Draw all pictures; titles and files by section."""
    shown: dict[str, dict[str, Path]] = {"Distributions of the true return": {}, "Effects by setting": {}}
    runs = [record for record in results.records if len(record.kl) > 1]
    lone = {r.setting for r in results.records} - {r.setting for r in runs}
    for point in dict.fromkeys(o.point for o in found):
        here = [o for o in found if o.point == point and o.gains]
        name = re.sub(r"\W+", "_", point).lower()
        # A run of one point is no trajectory: it stands beside the other settings' final policies nowhere.
        for title, there in (("", [o for o in here if o.setting not in lone]), (", single steps", _in(here, lone))):
            if not there:
                continue
            path = folder / f"distributions_{name}{'_steps' if title else ''}.png"
            distributions(there, path)
            shown["Distributions of the true return"][f"{point}{title}"] = path
            compared = [r for r in rows if r["point"] == point and (r["setting"] in lone) == bool(title)]
            for i, baseline in enumerate(dict.fromkeys(r["baseline"] for r in compared)):
                path = folder / f"effects_{name}{'_steps' if title else ''}_{i}.png"
                effects(there, [r for r in compared if r["baseline"] == baseline], baseline, path)
                shown["Effects by setting"][f"{point}{title}, against {baseline}"] = path
    plane = [o for o in found if o.setting not in lone] or list(found)
    mean_risk(plane, folder / "mean_risk.png")
    shown["Mean against risk"] = {"a mark for each setting": folder / "mean_risk.png"}
    if runs:
        return_against_kl(runs, folder / "return_against_kl.png")
        shown["Return against KL"] = {"all runs": folder / "return_against_kl.png"}
    return shown


def _in(found: Sequence[Outcome], settings: set[str]) -> list[Outcome]:
    return [outcome for outcome in found if outcome.setting in settings]


def _cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "–"
    if isinstance(value, Interval):
        return f"{value.value:.3g} ({value.low:.3g} to {value.high:.3g})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [[name.replace("_", " ") for name in names], *([_cell(row.get(name)) for name in names] for row in rows)]


def _markdown(title: str, sections: Sequence[Section]) -> str:
    lines = [f"# Study: {markdown.cell(title)}", ""]
    for section in sections:
        # What is indented is code, in which nothing acts.
        text = [row if row.startswith("    ") else markdown.line(row) for row in section.text]
        lines += [f"## {section.title}", "", *text, ""]
        if section.table:
            header, *body = ([markdown.cell(value) for value in row] for row in section.table)
            lines += [f"| {' | '.join(header)} |", f"| {' | '.join('---' for _ in header)} |"]
            lines += [f"| {' | '.join(row)} |" for row in body]
            lines.append("")
        for caption, path in section.pictures.items():
            shown = markdown.cell(caption)
            lines += [f"{shown}:", "", f"![{shown}](pictures/{path.name})", ""]
    return "\n".join(lines)


def _inline(line: str) -> Markup:
    """A line of text as HTML: bold words, no code."""
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", str(escape(line))).replace("`", ""))


def _html(title: str, sections: Sequence[Section]) -> str:
    return html("lit_vapo.study", "report.html.j2", {"inline": _inline}, title=title, sections=sections)


def _json(summary: Mapping[str, Any]) -> str:
    """A line for each row of a table: short, and a change shows where it is."""
    lines = []
    for key, value in summary.items():
        if isinstance(value, list) and value:
            rows = ",\n  ".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in value)
            lines.append(f" {json.dumps(key)}: [\n  {rows}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _plain(value: Any) -> Any:
    """Intervals as objects, so that JSON says what its numbers are; numbers to four digits, null for no end."""
    if isinstance(value, Interval):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
