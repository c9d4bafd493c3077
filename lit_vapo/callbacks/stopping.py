"""Signals that end a run: noticed at once, answered between two iterations, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

# What a spot machine or a job system sends, what Ctrl-C sends, and what Slurm is asked to send before its limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STANDARD_ERROR = 2


class Stopped(SystemExit):
    """A run that a signal has ended, with the exit code that shells give to it: 128 and the signal's number.

    Args:
        number: The signal.
        code: The exit code, where another is wanted.
    """

    def __init__(self, number: int, code: int | None = None) -> None:
        super().__init__(128 + number if code is None else code)
        self.signal = signal.Signals(number)


class Signals:
    """Takes note of the first signal that asks a run to end.

    Args:
        grace: Seconds after which the process ends, whether or not the run has come to a point where it can be saved.
        before_end: What is done then first.

    Attributes:
        received: Number of the signal, 0 before.
    """

    def __init__(self, grace: float, before_end: Callable[[], object]) -> None:
        self.grace = grace
        self.before_end = before_end
        self.received = 0
        self._former: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    def watch(self) -> None:
        """Take the signals; Python lets only the main thread do that."""
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._notice) for number in SIGNALS}

    def release(self) -> None:
        """Give the signals back."""
        if self._timer is not None:
            self._timer.cancel()
        for number, former in self._former.items():
            signal.signal(number, signal.SIG_DFL if former is None else former)
        self._former = {}

    def _notice(self, number: int, frame: Any) -> None:
        if self.received:
            return
        self.received = number
        name = signal.Signals(number).name
        again = "; Ctrl-C ends it at once" if number != signal.SIGINT else "; once more to end it at once"
        # The lock of a stream may be held by what was interrupted.
        os.write(STANDARD_ERROR, f"\n{name}: the run saves after this iteration and ends{again}\n".encode())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self._timer = threading.Timer(self.grace, self._give_up)
        self._timer.daemon = True
        self._timer.start()

    def _give_up(self) -> None:
        name = signal.Signals(self.received).name
        message = (
            f"{name}: this iteration is not over after {self.grace:g} seconds (checkpoint.grace_seconds): the run "
            "ends without it, and goes on from the checkpoint before\n"
        )
        os.write(STANDARD_ERROR, message.encode())
        self.before_end()
        os._exit(128 + self.received)


def stopped(trainer: Any, number: int) -> Stopped:
    """How this process of a run ends after a signal.

    One that Lightning has started must not look failed: Lightning would take it for a crash and kill the others.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    by_lightning = environment is not None and not environment.creates_processes_externally
    return Stopped(number, 0 if by_lightning and not trainer.is_global_zero else None)


def end_children(trainer: Any) -> None:
    """End the processes that Lightning has started from this one."""
    for child in getattr(trainer.strategy.launcher, "procs", ()):
        child.kill()
