"""Checkpoints of a run: when they are written, which are kept, and what a resumed run takes from them."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lit_vapo.callbacks.checkpoint_files import LAST, NAME, iteration_of, keep
from lit_vapo.callbacks.random_numbers import random_states, set_random_states
from lit_vapo.callbacks.run_state import RunState
from lit_vapo.callbacks.stopping import Signals, Stopped, end_children, stopped
from lit_vapo.callbacks.whole_io import PARTIAL, WholeCheckpointIO, tried
from lit_vapo.ranges import PositiveFloat, PositiveInt, check_ranges

# Saving takes at most this share of a run's time, where nothing else is asked for; and no more often than this.
SHARE, SECONDS = 0.01, 15.0


class RunCheckpoint(Checkpoint):
    """Saves a run between two iterations, when all that was logged of the one before is on the disk.

    There a resumed run goes on exactly: with the next batch, and with the next row of each file. A checkpoint is
    written beside its place and moved there when it is complete. `last.ckpt` is a link to the newest, and `best.ckpt`,
    where there is something to judge by, to the best. When a signal asks the run to end, it is saved and ends.

    Args:
        dirpath: Folder of the checkpoints; `null` for `checkpoints` in the run's folder.
        every_minutes: Save this often. With this and `every_iterations` at `null`, a checkpoint is written as often as
            takes 1% of the time, but not within 15 seconds of the last one.
        every_iterations: Save after this many batches (iterations in the ppo stage).
        keep_last: How many of the newest are kept; the best one is kept besides.
        monitor: What was validated, the best checkpoint by which is kept: `val/nll` in the reward stage, `val/loss` in
            the sft stage, unless said otherwise.
        mode: Whether less (`min`) or more (`max`) of it is better.
        on_failure: What to do when one cannot be written, on a full disk, say: `go_on` warns and tries again later, and
            `stop` ends the run. The ones before stay. At its end a run fails either way.
        grace_seconds: How long a run that is asked to end may take to finish its iteration. After that it ends without.

    Attributes:
        trained: Whether a batch was trained on in this process.
    """

    # What trackers ask of a checkpoint callback, to keep the best and the newest file.
    save_top_k = 1
    best_k_models: Mapping[str, Any] = {}

    def __init__(
        self,
        dirpath: str | None = None,
        every_minutes: PositiveFloat | None = None,
        every_iterations: PositiveInt | None = None,
        keep_last: PositiveInt = 2,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        on_failure: Literal["go_on", "stop"] = "go_on",
        grace_seconds: PositiveFloat = 120.0,
    ) -> None:
        check_ranges(RunCheckpoint, locals(), "checkpoint.")
        self.dirpath = dirpath
        self.every_minutes = every_minutes
        self.every_iterations = every_iterations
        self.keep_last = keep_last
        self.monitor = monitor
        self.mode = mode
        self.on_failure = on_failure
        self.grace_seconds = grace_seconds
        self.trained = False
        self.best: dict[str, Any] | None = None
        self._score: float | None = None
        self._signals: Signals | None = None
        self._io: WholeCheckpointIO | None = None
        self.state = RunState()
        self._saved_at = self._cost = 0.0

    @property
    def folder(self) -> Path:
        """Where checkpoints are."""
        assert self.dirpath is not None
        return Path(self.dirpath)

    @property
    def last_model_path(self) -> str:
        """The newest checkpoint."""
        return str((self.folder / LAST).resolve())

    @property
    def best_model_path(self) -> str:
        """The best checkpoint, if there is one."""
        return "" if self.best is None else str(self.folder / self.best["name"])

    @property
    def best_model_score(self) -> float | None:
        """What the best one was judged by."""
        return None if self.best is None else self.best["score"]

    current_score = best_model_score

    # 1. Begin.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write whole files, and clear away what a killed process left of one."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        # Whoever has put one of their own there wants that.
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
        io = trainer.strategy.checkpoint_io
        self._io = io if isinstance(io, WholeCheckpointIO) else None
        if stage != "fit":
            return
        if trainer.is_global_zero:
            root = Path(trainer.default_root_dir)
            left = (self.folder, root, *root.glob("logs/*"))
            for path in (path for folder in left for path in folder.glob(PARTIAL.format("*"))):
                path.unlink()
        self.state.look(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish what a killed process may have left half done of the checkpoint that is resumed."""
        if not self.owns(trainer.ckpt_path):
            # Another run's: what was best of it stays with it.
            self.best = None
        elif trainer.is_global_zero and iteration_of(path := Path(str(trainer.ckpt_path)).resolve()) is not None:
            self._point_to(path.name)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take files back to where the checkpoint stood, and take note of signals from now on."""
        if trainer.is_global_zero and self.owns(trainer.ckpt_path):
            self.state.rewind()
        self._saved_at, self._cost = time.monotonic(), 0.0
        self._signals = Signals(self.grace_seconds, lambda: end_children(trainer))
        self._signals.watch()

    def owns(self, path: str | Path | None) -> bool:
        """Whether a checkpoint is one of this run."""
        return path is not None and Path(path).resolve().parent == self.folder.resolve()

    # 2. Between two iterations: all that was logged of the one before is on the disk.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save if it is time, and end the run if it is asked to."""
        self.state.take_up(trainer)
        progress = trainer.fit_loop.epoch_loop.batch_progress
        # Gradients that are being summed up are in no checkpoint.
        whole = progress.current.completed % trainer.accumulate_grad_batches == 0
        if not whole or getattr(trainer, "fast_dev_run", False):
            return
        number, due = self._agree(trainer, self._received, self._is_due(progress.total.completed))
        better = self._better()
        if self.trained and (number or due or better is not None):
            self._save(trainer, better, strict=bool(number))
        if number:
            raise stopped(trainer, number)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Take notice that something was learned."""
        self.trained = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take notice of how good the policy or ensemble is now.

        Raises:
            ValueError: What is to be monitored was not validated.
        """
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            there = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise ValueError(f"checkpoint.monitor: expected one of {there}, got {self.monitor!r}")
        self._score = float(trainer.callback_metrics[self.monitor])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of training."""
        if self.trained and not getattr(trainer, "fast_dev_run", False):
            self._save(trainer, self._better(), at_end=True, strict=True)
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back; processes that Lightning started would wait for this one."""
        self._release()
        if trainer.is_global_zero and not isinstance(exception, Stopped):
            end_children(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._release()

    def _release(self) -> None:
        if self._signals is not None:
            self._signals.release()

    # 3. Whether.

    @property
    def _received(self) -> int:
        return 0 if self._signals is None else self._signals.received

    def _is_due(self, iteration: int) -> bool:
        since = time.monotonic() - self._saved_at
        if self.every_minutes is None and self.every_iterations is None:
            return since >= max(SECONDS, self._cost / SHARE)
        by_number = self.every_iterations is not None and iteration % self.every_iterations == 0
        return by_number or (self.every_minutes is not None and since >= 60 * self.every_minutes)

    def _agree(self, trainer: Trainer, number: int, due: bool) -> tuple[int, bool]:
        """The same answer in all processes: a signal may reach one alone, and clocks differ."""
        if trainer.world_size == 1:
            return number, due
        flags = torch.tensor([number, int(due)], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        number, any_due = flags.tolist()
        return number, bool(any_due)

    def _better(self) -> float | None:
        """What the last validation found, if that was the best so far; asked once of each."""
        score, self._score = self._score, None
        if score is None or math.isnan(score):
            return None
        former = None if self.best is None else self.best["score"]
        if former is not None and (score >= former if self.mode == "min" else score <= former):
            return None
        return score

    # 4. Save.

    def _save(self, trainer: Trainer, score: float | None, at_end: bool = False, strict: bool = False) -> None:
        started, before = time.monotonic(), self.best
        name = NAME.format(trainer.fit_loop.epoch_loop.batch_progress.total.completed)
        if score is not None or (at_end and self.best is None and self.monitor is not None):
            # Of a run without a validation the end is the best there is.
            self.best = {"score": score, "name": name}
        failure = self._write(trainer, self.folder / name, between=not at_end)
        if failure is None:
            pointed = tried(lambda: self._point_to(name)) if trainer.is_global_zero else None
            failure = trainer.strategy.broadcast(pointed)
        if failure is not None:
            self.best = before
        for logger in trainer.loggers:
            logger.after_save_checkpoint(cast("Any", self))
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started
        if failure is not None:
            if strict or self.on_failure == "stop":
                raise failure
            warnings.warn(
                f"{failure.filename}: {failure.strerror}. Not saved; the checkpoints before stay. The run goes on, and "
                "tries again later.",
                stacklevel=2,
            )

    def _write(self, trainer: Trainer, path: Path, between: bool) -> OSError | None:
        """Write a checkpoint; why it could not be written, in all processes."""
        failure = trainer.strategy.broadcast(tried(self.state.flush) if trainer.is_global_zero else None)
        if failure is not None:
            return failure
        if self._io is not None:
            self._io.keep_failure, self._io.failure = True, None
        self.state.between = between
        # Whether a run was saved here must not show in what it draws later.
        before = random_states()
        trainer.save_checkpoint(path, weights_only=False)
        set_random_states(before)
        # Others save, too, at other moments.
        self.state.between = False
        if self._io is None:
            return None
        self._io.keep_failure = False
        return trainer.strategy.broadcast(self._io.failure)

    def _point_to(self, newest: str) -> None:
        keep(self.folder, newest, "" if self.best is None else self.best["name"], self.keep_last)

    # 5. State.

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides weights, optimisers and counters."""
        return {"best": self.best, **self.state.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint says for the moment at which it was written."""
        self.best = state_dict.get("best")
        self.state.resumed = dict(state_dict)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the counters say where the run is."""
        self.state.count(trainer, checkpoint, checkpoint["callbacks"][self.state_key])
