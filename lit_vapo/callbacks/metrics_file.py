"""The metrics of a run as one CSV file, which each row reaches at once and which a resumed run goes on with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lit_vapo.callbacks.line_file import LineFile, TableFile

NAME = "metrics.csv"


class MetricsFile(CSVLogger):
    """Lightning's CSVLogger, whose `metrics.csv` is added to and never written over.

    Lightning's own keeps a hundred rows in memory, writes over the file where a column is new, and removes the file of
    a run that is resumed.

    Args:
        save_dir: Folder of the run.
        name: Folder in it.
        version: Folder in that; `None` for the next `version_N`.
        prefix: What every name begins with.
    """

    def __init__(
        self, save_dir: str | Path, name: str = "logs", version: int | str | None = None, prefix: str = ""
    ) -> None:
        super().__init__(save_dir, name, version, prefix)

    @classmethod
    def like(cls, logger: CSVLogger, files: Iterable[Path] = ()) -> MetricsFile:
        """One that writes where another would have written, or goes on with one of `files` that stands there."""
        there = [
            path.parent
            for path in files
            if path.name == NAME and path.resolve().parents[1] == Path(logger.root_dir).resolve()
        ]
        version = there[0].name if there else logger._version
        return cls(logger.save_dir, logger.name, version, logger._prefix)

    @cached_property
    def rows(self) -> TableFile:
        """The file."""
        return _Rows(Path(self.log_dir) / NAME)

    @property
    def line_files(self) -> list[LineFile]:
        """What grows by lines."""
        return [self.rows]

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What writes."""
        return self.rows

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Tensor | float], step: int | None = None) -> None:
        """Add a row."""
        prefix = f"{self._prefix}{self.LOGGER_JOIN_CHAR}" if self._prefix else ""
        row = {f"{prefix}{name}": x.item() if isinstance(x, Tensor) else x for name, x in metrics.items()}
        self.experiment.append({**row, "step": step or 0})

    @rank_zero_only
    def save(self) -> None:
        """Write what waits, as far as that can be: Lightning asks for it after each row, which has warned already."""
        with suppress(OSError):
            self.rows.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what waits; of a run that failed as far as that can be."""
        self.rows.flush() if status == "success" else self.save()


class _Rows(TableFile):
    """The table, as Lightning speaks to it."""

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        """Nothing: the whole configuration stands beside the table, in `config.yaml`."""
