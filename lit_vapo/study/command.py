"""`lit-vapo study run` and `lit-vapo study report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_vapo.commands.options import Parser
from lit_vapo.study import execution
from lit_vapo.study.execution import Results, Study
from lit_vapo.study.report import report as write_report
from lit_vapo.study.tracking import track

PROJECT = (
    "Project of Weights & Biases to log to, when all is done: a run for each method in each setting, in one group."
)
FIELDS = tuple(Study.__dataclass_fields__)


def run(words: Sequence[str]) -> None:
    """Run what is missing of a study, and report.

    Args:
        words: Options.
    """
    study, config, how, project = _parsed("run", (run.__doc__ or "").partition("\n")[0], words)
    results = execution.run(study, config, **how)
    missing = sum(results.missing.values())
    if missing:
        print(f"{missing} repetitions are left to other shards. When all are done: lit-vapo study report.")
        return
    _tell(study, config, results, project)


def report(words: Sequence[str]) -> None:
    """Report on what there is of a study.

    Args:
        words: Options.

    Raises:
        ValueError: The folder is not that of a study.
    """
    study, config, _, project = _parsed("report", (report.__doc__ or "").partition("\n")[0], words)
    if not (Path(study.output) / "study.json").is_file():
        raise ValueError(f"output: expected the folder of a study, got {study.output!r}")
    execution.claim(study, config)
    _tell(study, config, execution.merge(study), project)


def _parsed(
    command: str, summary: str, words: Sequence[str]
) -> tuple[Study, dict[str, Any], dict[str, Any], str | None]:
    """A study, its configuration as it is written down, how to run it, and the project that it is logged to."""
    parser = Parser(prog=f"lit-vapo study {command}", description=summary)
    parser.add_argument("--config", action="config", help="Options from a file.")
    parser.add_class_arguments(Study, as_group=False)
    parser.add_argument("--project", type=str | None, default=None, help=PROJECT)
    if command == "run":
        parser.add_function_arguments(execution.run, skip={"study", "config"}, as_group=False)
    parsed = parser.parse_args(list(words))
    dumped = yaml.safe_load(parser.dump(parsed, skip_none=False))
    given = parser.instantiate_classes(parsed).as_dict()
    how = {name: value for name, value in given.items() if name not in (*FIELDS, "config", "project")}
    study = Study(**{name: given[name] for name in FIELDS})
    return study, {name: dumped[name] for name in FIELDS}, how, given["project"]


def _tell(study: Study, config: dict[str, Any], results: Results, project: str | None) -> None:
    for claim in write_report(study, config, results):
        print(f"- {claim.replace('**', '')}")
    print(f"Report: {study.output}/report.html")
    if project is not None:
        track(study, config, results, project)
