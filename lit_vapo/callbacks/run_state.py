"""Where a run is, beside what Lightning's checkpoints hold: files, random numbers, counters, and what it reads."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import Trainer

from lit_vapo.callbacks.line_file import LineFile, position, rewind
from lit_vapo.callbacks.random_numbers import random_states, set_random_states
from lit_vapo.models.processes import of_all
from lit_vapo.trackers import run_ids


class RunState:
    """Noted between two iterations, and taken up by a resumed run before its first one.

    Attributes:
        began_with: What the run read when it began, by key, where it is resumed in its own folder.
        between: Whether a checkpoint is written between two iterations, rather than at the end.
        reads: What the run reads: a digest of each data set, model and folder, by key.
        resumed: What the checkpoint said, until the first iteration.
    """

    def __init__(self) -> None:
        self.began_with: dict[str, str] = {}
        self.between = False
        self.resumed: dict[str, Any] | None = None
        self.reads: dict[str, str] = {}
        # Files that grow by lines, by their names in the run's folder.
        self._line_files: dict[str, LineFile] = {}
        self._loggers: list[Any] = []

    def look(self, trainer: Any) -> None:
        """Note what the run reads and writes, before any model is loaded.

        Raises:
            ValueError: Data, tokenizer, or a model has changed since the run began.
        """
        # The tokenizer may lie beside the base, and says more.
        for reader in (trainer.datamodule, trainer.lightning_module):
            self.reads |= getattr(reader, "fingerprints", dict)()
        for name, now in self.reads.items():
            then = self.began_with.get(name, now)
            if then != now:
                raise ValueError(
                    f"{name}: expected what the run began with (digest {then[:16]}), got something else (digest "
                    f"{now[:16]}). Resume with what it was, or begin a new run in another folder; a checkpoint of "
                    "this run may be given to that by --ckpt_path."
                )
        self._loggers = list(trainer.loggers)
        # By their class: a tracker that has failed answers to any name.
        writers = [x for x in (*trainer.loggers, *trainer.callbacks) if hasattr(type(x), "line_files")]
        for file in (file for writer in writers for file in writer.line_files):
            self._line_files[os.path.relpath(file.path, trainer.default_root_dir)] = file

    def flush(self) -> None:
        """Have all lines on the disk that a checkpoint counts on.

        Raises:
            OSError: There is no room for them.
        """
        for file in self._line_files.values():
            file.flush()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of this; all processes must ask."""
        return {
            "reads": self.reads,
            "trackers": run_ids(self._loggers),
            "files": {name: position(file.path) for name, file in self._line_files.items()},
            "random": of_all(random_states()),
        }

    def rewind(self) -> None:
        """Take the files back to where they were."""
        for name, place in (self.resumed or {}).get("files", {}).items():
            if name in self._line_files:
                rewind(self._line_files[name].path, place)

    def count(self, trainer: Trainer, checkpoint: dict[str, Any], own: dict[str, Any]) -> None:
        """Let the counters of a checkpoint say that the batch which is about to begin has not begun."""
        own["between"] = self.between
        own["batches_that_stepped"] = trainer.fit_loop.epoch_loop._batches_that_stepped
        if self.between:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts["ready"] = counts["completed"]
            progress["is_last_batch"] = False

    def take_up(self, trainer: Trainer) -> None:
        """Be where the run was when it was saved; asked before each iteration, done before the first."""
        if self.resumed is None:
            return
        states = self.resumed.get("random", [])
        if trainer.global_rank < len(states):
            set_random_states(states[trainer.global_rank])
        if self.resumed.get("between"):
            # Lightning counts the batch before once more, or not, by where it takes the checkpoint to be from.
            trainer.fit_loop.epoch_loop._batches_that_stepped = self.resumed["batches_that_stepped"]
        self.resumed = None
