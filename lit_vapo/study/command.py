"""`lit-vapo study run` and `lit-vapo study report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from lit_vapo.commands.options import Parser
from lit_vapo.study import execution
from lit_vapo.study.execution import Study
from lit_vapo.study.report import report

FIELDS = tuple(Study.__dataclass_fields__)


def main(words: Sequence[str]) -> None:
    """Run a study or report on one.

    Args:
        words: The command line after `study`: `run` or `report`, and options.
    """
    command, *options = words
    summary = {"run": "Run what is missing of a study, and report.", "report": "Report on what there is of a study."}
    parser = Parser(prog=f"lit-vapo study {command}", description=summary[command])
    parser.add_argument("--config", action="config", help="Options from a file.")
    parser.add_class_arguments(Study, as_group=False)
    if command == "run":
        parser.add_function_arguments(execution.run, skip={"study", "config"}, as_group=False)
    parsed = parser.parse_args(options)
    dumped = yaml.safe_load(parser.dump(parsed, skip_none=False))
    config = {name: dumped[name] for name in FIELDS}
    given = parser.instantiate_classes(parsed).as_dict()
    study = Study(**{name: given[name] for name in FIELDS})
    if command == "run":
        how = {name: value for name, value in given.items() if name not in (*FIELDS, "config")}
        results = execution.run(study, config, **how)
        missing = sum(results.missing.values())
        if missing:
            print(f"{missing} repetitions are left to other shards. When all are done: lit-vapo study report.")
            return
    else:
        if not (Path(study.output) / "study.json").is_file():
            raise ValueError(f"output: expected the folder of a study, got {study.output!r}")
        execution.claim(study, config)
        results = execution.merge(study)
    for claim in report(study, config, results):
        print(f"- {claim.replace('**', '')}")
    print(f"Report: {study.output}/report.html")
