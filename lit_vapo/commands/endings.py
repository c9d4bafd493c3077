"""How a run ends, in the exit codes and messages that whoever waits for it can use."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_vapo.commands.advice import is_out_of_memory, memory_advice
from lit_vapo.commands.resume import NothingToDoError
from lit_vapo.console import FAILED, INTERRUPTED, TERMINATED, complain

# How Lightning begins to say that there is no such metric.
EARLY_STOPPING = "Early stopping conditioned on metric"
# Who started this process; another one has taken over if it died.
_PARENT = os.getppid()


@contextmanager
def told(run: Any) -> Iterator[None]:
    """A block in which a run happens.

    Args:
        run: Its command line, which has `stage`, and `subcommand`, `config` and `trainer` from some time on.

    Raises:
        ValueError: Options do not fit together, or there is no more memory; the message says what to do.
        SystemExit: A signal or the death of another process ended it.
    """
    try:
        yield
    except NothingToDoError:
        return
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        if str(error).startswith(EARLY_STOPPING):
            raise ValueError(f"trainer.callbacks: {error}") from error
        if is_out_of_memory(error) and run.subcommand is not None:
            raise ValueError(memory_advice(error, run.stage, run.subcommand, run.config[run.subcommand])) from error
        # Whoever waits for a process that has died finds out by an error of the network.
        lost = lost_process(getattr(run, "trainer", None))
        if lost is None:
            raise
        complain(lost)
        raise SystemExit(FAILED) from error
    except SystemExit as error:
        # Lightning ends with 0 or 1, which says too little to whoever waits for this run.
        if isinstance(error, SIGTERMException):
            raise SystemExit(TERMINATED) from error
        if isinstance(error.__context__, KeyboardInterrupt):
            raise SystemExit(INTERRUPTED) from error
        raise


def lost_process(trainer: Any) -> str | None:
    """Which process of a run has died, in words for the user; `None` if all that this one knows of live.

    Args:
        trainer: The trainer; `None` before there is one.
    """
    children = getattr(getattr(getattr(trainer, "strategy", None), "launcher", None), "procs", ())
    lost = None
    for rank, child in enumerate(children, start=1):
        code = child.poll()
        if code:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            lost = f"process {rank} of this run (PID {child.pid}) {how}"
    if lost is None and not children and os.environ.get("LOCAL_RANK", "0") != "0" and os.getppid() != _PARENT:
        lost = f"process 0 of this run (PID {_PARENT}) has died"
    return lost and f"{lost}; the others cannot go on without it. With --resume it goes on from its last checkpoint."


def write_page(folder: Path, logs: str | None = None) -> None:
    """Write the page about a run that has just ended.

    Where it cannot be written, that is a warning: the run is whole.

    Args:
        folder: The run's.
        logs: Where its metrics and configuration are, from there, if the folder does not tell.
    """
    try:
        # Nothing that only a page needs delays the start.
        from lit_vapo.commands.report import report

        report([str(folder)], logs=logs)
    except Exception as error:
        again = f"try again with: lit-vapo report {folder}"
        warnings.warn(f"no report could be written ({type(error).__name__}: {error}); {again}", stacklevel=2)
