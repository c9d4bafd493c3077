"""Progress where there is no terminal: a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from lit_vapo import progress
from lit_vapo.progress import clock

Figures = Callable[[], dict[str, Any]]
Line = tuple[str, Figures]


def lines_for_bar(callbacks: list[Callback], chosen: Sequence[Callback] | Callback | None) -> list[Callback]:
    """The callbacks of a run, with lines in place of Lightning's own bar where there is no terminal to draw it on.

    Args:
        callbacks: All of them.
        chosen: Those that the user named; a bar among them stays.
    """
    named = [chosen] if isinstance(chosen, Callback) else list(chosen or [])
    if sys.stderr.isatty() or any(isinstance(callback, ProgressBar) for callback in named):
        return callbacks
    return [PlainProgress() if isinstance(callback, ProgressBar) else callback for callback in callbacks]


class PlainProgress(ProgressBar):
    """Lines in place of a bar, for logs: what is done, since when, and the figures of the bar.

    A line is printed after a batch if the last one is `EVERY` seconds old, and at the end of training, of a test, of a
    validation that is not part of a training, and of predictions.
    """

    def __init__(self) -> None:
        super().__init__()
        self._silent = False
        self._started = self._said = time.monotonic()
        self._unsaid: Line | None = None

    @property
    def is_enabled(self) -> bool:
        """Whether this process speaks; Lightning asks before it prints what a module says."""
        return not self._silent

    def disable(self) -> None:
        """Say nothing: of several processes, one speaks."""
        self._silent = True

    def enable(self) -> None:
        """Speak."""
        self._silent = False

    def on_train_start(self, *args: Any) -> None:
        """The clock starts."""
        self._started = self._said = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell how far training is."""
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs
        title = f"epoch {epoch}{f' of {epochs}' if epochs and epochs > 0 else ''}, batch" if epochs != 1 else "batch"
        # Lightning's own total would shrink with each step where `max_steps` is what ends the run.
        # Reading figures waits for the device, so that is left to lines that are printed.
        self._unsaid = self._tell(
            title, batch_idx + 1, trainer.num_training_batches, lambda: self.get_metrics(trainer, pl_module)
        )

    def on_train_end(self, *args: Any) -> None:
        """Tell where training has ended, if that was not told yet."""
        if self._unsaid is not None:
            self._say(*self._unsaid)
            self._unsaid = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Tell how far the evaluation is."""
        if not trainer.sanity_checking:
            self._tell_part("validation", batch_idx, trainer.num_val_batches, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Tell how far the test is."""
        self._tell_part("test", batch_idx, trainer.num_test_batches, dataloader_idx)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Tell how many prompts have an answer."""
        self._tell_part("predict", batch_idx, trainer.num_predict_batches, dataloader_idx)

    def _tell_part(self, title: str, batch_idx: int, batches: Any, loader: int) -> None:
        """Tell how far one of several loaders is."""
        self._tell(f"{title}, batch", batch_idx + 1, batches[loader] if isinstance(batches, list) else batches)

    def _tell(self, title: str, done: int, total: int | float, figures: Figures = dict[str, Any]) -> Line | None:
        """Print a line if it is time for one; else return it."""
        now = time.monotonic()
        of = f" of {int(total)}" if total != float("inf") else ""
        line = (f"{title} {done}{of}, {clock(now - self._started)}", figures)
        # Epochs may be short: within `fit`, the last batch of one is like any other.
        last = done == total and self.trainer.state.fn != TrainerFn.FITTING
        if not last and now - self._said < progress.EVERY:
            return line
        self._said = now
        self._say(*line)
        return None

    def _say(self, line: str, figures: Figures) -> None:
        if not self._silent:
            shown = [f"{name.rpartition('/')[2]} {_short(x)}" for name, x in figures().items() if name != "v_num"]
            print(" | ".join([line, *shown]), file=sys.stderr, flush=True)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
