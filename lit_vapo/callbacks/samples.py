"""Tables of sampled texts, on disk and in Weights & Biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_vapo.callbacks.line_file import LineFile
from lit_vapo.evaluation.policy_report import MEMBERS_SHOWN
from lit_vapo.folders import write_whole
from lit_vapo.ranges import PositiveInt, check_ranges
from lit_vapo.trackers import log_table

PREDICTED = "samples_predict.jsonl"


class SampleTable(Callback):
    """Writes what the policy said at each evaluation: one JSON line for each response, and a W&B table.

    Reads `samples` of the module, a list of records. Files in the run's folder: `samples_val.jsonl` (one block
    for each evaluation, marked by `step`), `test/responses.jsonl` and `samples_predict.jsonl`.

    Args:
        num_samples: Most rows of a W&B table.
    """

    def __init__(self, num_samples: PositiveInt = 32) -> None:
        check_ranges(SampleTable, locals(), "samples.")
        self.num_samples = num_samples
        self._course: LineFile | None = None

    @property
    def line_files(self) -> list[LineFile]:
        """What grows by lines in the course of a run."""
        return [] if self._course is None else [self._course]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Know where samples go."""
        if stage == "fit":
            self._course = LineFile(Path(trainer.default_root_dir) / "samples_val.jsonl")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Append the samples of this evaluation."""
        if not trainer.sanity_checking:
            self._write(trainer, pl_module, "val", "samples_val.jsonl", self._course)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the responses that were asked for, and say where."""
        self._write(trainer, pl_module, "predict", PREDICTED)
        if trainer.is_global_zero and (count := len(getattr(pl_module, "samples", []))):
            print(f"{count} responses: {Path(trainer.default_root_dir) / PREDICTED}", flush=True)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the samples of the test."""
        self._write(trainer, pl_module, "test", "test/responses.jsonl")

    def _write(
        self, trainer: Trainer, pl_module: LightningModule, split: str, name: str, course: LineFile | None = None
    ) -> None:
        records: list[dict[str, Any]] = getattr(pl_module, "samples", [])
        if not records or not trainer.is_global_zero:
            return
        lines = "".join(json.dumps({"step": trainer.global_step, **record}) + "\n" for record in records)
        if course is not None:
            course.append(lines)
        else:
            write_whole(Path(trainer.default_root_dir) / name, lines)
        columns, rows = _table(records[: self.num_samples])
        log_table(trainer.loggers, f"{split}/samples", columns, rows)


def _table(records: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Records as columns and rows, with a column for each of the first members."""
    names = [name for name in dict.fromkeys(key for record in records for key in record) if name != "members"]
    count = len(records[0].get("members", [])[:MEMBERS_SHOWN])
    rows = [[_cell(record.get(name)) for name in names] + record.get("members", [])[:count] for record in records]
    return names + [f"member_{k}" for k in range(count)], rows


def _cell(value: Any) -> Any:
    """A value that W&B has a type for whatever stands in the rows beside it."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value
