"""`lit-vapo report`: a run, or several side by side, as one page that needs no server."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from lit_vapo.commands.environment import facts as machine_facts
from lit_vapo.commands.options import Parser
from lit_vapo.commands.run_folder import CLAIM, FINISHED
from lit_vapo.evaluation.findings import Finding, policy_findings, verdict_findings
from lit_vapo.evaluation.policy_files import read_evaluations
from lit_vapo.figures.runs import PANELS, curves, distributions
from lit_vapo.folders import write_whole
from lit_vapo.pages import html

PAGE, PICTURES = "report.html", "report"
SHOWN = 10
# What is shown of the mean of an ensemble.
FIGURES = ("accuracy", "nll", "ece")
MARKS = {"good": "ok  ", "look": "look", "bad": "BAD "}
# Figures that are set side by side, as far as runs have them.
SIDE_BY_SIDE = ("reward_gain", "gold_gain", "reward_win_rate", "win_rate", "kl_k3", "ensemble_sigma", "response_length")


@dataclass
class Run:
    """What the page says of a run.

    Attributes:
        name: Its folder; with the one above it where that says more.
        stage: `ppo`, `reward` or `sft`.
        settings: All of them, as YAML.
        facts: The run in a few lines.
        findings: Whether to trust it.
        figures: What is set side by side with another run's.
        pictures: By their captions.
        samples: Responses, as cells of a table.
    """

    name: str
    stage: str
    settings: str
    facts: dict[str, str]
    findings: list[Finding]
    figures: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)


def report(runs: list[str], output: str | None = None, logs: str | None = None) -> None:
    """Write one page about a run of PPO or of reward training: what happened, and whether to trust it.

    Args:
        runs: Folders of runs (`trainer.default_root_dir`); several are set side by side.
        output: The page; `null` for `report.html` in the folder of the first run. Pictures go to `report/` of each.
        logs: Where metrics and configuration are, from a run's folder, if that does not tell.

    Raises:
        ValueError: A folder holds no run, or one that has logged nothing yet.
    """
    found = [read_run(Path(run), logs) for run in runs]
    path = Path(output) if output is not None else Path(runs[0]) / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page(found))
    for run in found:
        print(f"{run.name}")
        for finding in run.findings:
            print(f"  {MARKS[finding.level]} {finding.text}")
    print(f"report: {path}")


def main(words: Sequence[str]) -> None:
    """The command line."""
    parser = Parser(prog="lit-vapo report", description="One page about a run, or about several side by side.")
    parser.add_argument("runs", nargs="+", help="Folders of runs (trainer.default_root_dir).")
    parser.add_argument("--output", default=None, type=str | None, help="The page; report.html of the first run.")
    options = parser.parse_args(list(words))
    report(options.runs, options.output)


def read_run(folder: Path, logs: str | None = None) -> Run:
    """What a run has written.

    Args:
        folder: The run's.
        logs: Where metrics and configuration are, from there, if the folder does not tell.

    Raises:
        ValueError: It is no run, or has logged nothing yet.
    """
    known = _json(folder / CLAIM) | _json(folder / FINISHED)
    place = _logs(folder, known.get("logs") or [], logs)
    metrics = _rows(place / "metrics.csv")
    # A run that was resumed with other settings has several.
    newest = max(place.glob("config*.yaml"), key=lambda path: _number(path.stem))
    settings = yaml.safe_load(newest.read_text(encoding="utf-8"))
    model = settings["model"]
    stage = "ppo" if "objective" in model else "reward" if "head" in model else "sft"
    facts = {"model": str(model["base"]["path"])}
    if stage == "ppo":
        facts |= {"reward": _named(model["reward"]), "objective": _named(model["objective"]) or "VarianceAware"}
    elif stage == "reward":
        facts["members"] = _named(model["head"]) or "HeadEnsemble"
        if count := ((model["head"] or {}).get("init_args") or {}).get("num_members"):
            facts["members"] = f"{count}, {facts['members']}"
    ended = known.get("ended")
    facts["ended"] = "not yet" if ended is None else ended[:16].replace("T", " ")
    if "steps" in known:
        facts["ended"] += f", after {known['steps']} weight updates"
    whole = folder.resolve()
    name = f"{whole.parent.name}/{whole.name}" if whole.name in PANELS else whole.name
    run = Run(name, stage, yaml.safe_dump(settings, allow_unicode=True, sort_keys=False), facts, [])
    drawn = folder / PICTURES
    if curves(drawn / "curves.png", metrics, stage):
        run.pictures["The course of the run"] = drawn / "curves.png"
    test, old = _test(folder, ended)
    if test.get("step") is not None:
        facts["tested"] = f"after {test['step']} weight updates"
    if stage == "ppo":
        _read_policy(run, folder, metrics, test)
    else:
        _read_rewards(run, folder, metrics, test)
    if old:
        text = f"A test here is older than the training: lit-vapo {stage} test renews it."
        run.findings.append(Finding("look", text))
    return run


def _test(folder: Path, ended: str | None) -> tuple[dict[str, Any], bool]:
    """What a test found; nothing, and `True`, of one that is older than the end of training."""
    path = folder / "test/evaluation.json"
    found = _json(path)
    if found and ended is not None and path.stat().st_mtime < datetime.fromisoformat(ended).timestamp():
        return {}, True
    return found, False


def _logs(folder: Path, marked: Sequence[str], told: str | None) -> Path:
    """Where a run logged: as its mark says, or else the newest of its folders that has something of a training.

    Raises:
        ValueError: There is no such folder.
    """
    places = [folder / name for name in marked]
    others = [*folder.glob("logs/*"), *([] if told is None else [folder / told])]
    for found in (places, others):
        if kept := [place for place in found if (place / "config.yaml").is_file()]:
            return max(kept, key=lambda x: (_logged(x, "train/"), _logged(x, "val/"), _number(x.name)))
    raise ValueError(f"{folder}: expected the folder of a run (with logs/version_N/config.yaml), got none")


def _logged(logs: Path, prefix: str) -> bool:
    """Whether metrics of such names were logged."""
    path = logs / "metrics.csv"
    names = path.read_text(encoding="utf-8").partition("\n")[0] if path.is_file() else ""
    return any(name.startswith(prefix) for name in names.split(","))


def _number(name: str) -> int:
    """What a name ends with, 0 for none."""
    found = re.search(r"\d+$", name)
    return int(found[0]) if found else 0


def _read_policy(
    run: Run, folder: Path, metrics: Sequence[Mapping[str, float]], test: Mapping[str, Mapping[str, float]]
) -> None:
    course = read_evaluations(folder / "evaluations.csv")
    ratios = [row["train/first_ratio"] for row in metrics if "train/first_ratio" in row]
    # As a test writes it; NaN is null in JSON.
    both = [test["reference"], {**test["policy"], **test["comparison"]}] if test else []
    rows = [{name: math.nan if x is None else x for name, x in row.items()} for row in both]
    run.findings = policy_findings(course, ratios, rows)
    if judged := (rows or course)[-1:]:
        run.figures = {name: float(x) for name in SIDE_BY_SIDE if (x := judged[0].get(name)) is not None}
    picture = folder / ("test/overoptimisation.png" if test else "overoptimisation.png")
    if picture.is_file():
        run.pictures["Gain over the reference against √KL"] = picture
    records = _lines(folder / ("test/responses.jsonl" if test else "samples_val.jsonl"))
    # Of the last evaluation, and of the reference, which answered once.
    last = max((record.get("step", 0) for record in records), default=0)
    records = [r for r in records if r["policy"] == "reference" or r.get("step", last) == last]
    if records:
        distributions(folder / PICTURES / "distributions.png", records)
        run.pictures["Before and after"] = folder / PICTURES / "distributions.png"
        run.samples = _samples(records)


def _read_rewards(run: Run, folder: Path, metrics: Sequence[Mapping[str, float]], test: Mapping[str, Any]) -> None:
    if test:
        run.findings = verdict_findings(test.get("verdict", {}).get("sentences", []))
        run.figures = {name: float(test["mean"][name]) for name in FIGURES}
        names = {"reliability": "Calibration", "risk_coverage": "Errors by how many are left", "sigma": "σ"}
        pictures = {title: folder / f"test/{name}.png" for name, title in names.items()}
        run.pictures |= {title: path for title, path in pictures.items() if path.is_file()}
    elif run.stage == "reward":
        validated = next((row for row in reversed(metrics) if "val/accuracy" in row), {})
        run.figures = {name: validated[f"val/{name}"] for name in FIGURES if f"val/{name}" in validated}
        said = ", ".join(f"{name} {value:.3g}" for name, value in run.figures.items())
        text = "Not tested yet: lit-vapo reward test says whether to trust it."
        run.findings = [Finding("look", text + f" The last validation found {said}." * bool(said))]


def _samples(records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Answers of reference and policy to the first prompts, under each other."""
    prompts = list(dict.fromkeys(record["prompt_id"] for record in records))[:SHOWN]
    shown = []
    for prompt in prompts:
        for who in ("reference", "policy"):
            first = next((r for r in records if r["prompt_id"] == prompt and r["policy"] == who), None)
            if first is not None:
                shown.append(
                    {
                        "prompt": str(first["prompt"]),
                        "policy": who,
                        "response": str(first["response"]),
                        "reward": f"{first['reward']:.2f} ± {first.get('sigma') or math.nan:.2f}",
                        "gold": "" if first.get("gold") is None else f"{first['gold']:.2f}",
                        "members": " ".join(f"{x:.1f}" for x in (first.get("members") or [])[:SHOWN]),
                    }
                )
    return shown


def page(runs: Sequence[Run]) -> str:
    """The page, pictures and all."""
    names = dict.fromkeys(name for run in runs for name in run.figures)
    figures = {name: [f"{run.figures.get(name, math.nan):.3g}" for run in runs] for name in names}
    figures |= _differences([dict(_flat(yaml.safe_load(run.settings))) for run in runs])
    machine = "\n".join(f"{name}: {value}" for name, value in machine_facts().items())
    title = " and ".join(run.name for run in runs)
    shown = figures if len(runs) > 1 else {}
    return html("lit_vapo.commands", "report.html.j2", title=title, runs=runs, figures=shown, machine=machine)


def _differences(settings: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs, where these are of one kind and have them all."""
    shared = [key for key in settings[0] if all(key in each for each in settings)]
    found = {key: [each[key] for each in settings] for key in shared if key != "trainer.default_root_dir"}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def _flat(settings: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(settings, dict) and settings:
        for name, value in settings.items():
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, "null" if settings is None else str(settings)


def _named(value: Any) -> str:
    """A folder, or the name of a class."""
    if isinstance(value, dict):
        return str(value.get("class_path", "")).rpartition(".")[2]
    return "" if value is None else str(value)


def _json(path: Path) -> dict[str, Any]:
    """What a file says; nothing where there is none, or half of one, as where a run has just begun."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _rows(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: float(x) for name, x in row.items() if x} for row in csv.DictReader(file)]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
