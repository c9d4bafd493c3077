"""The processes of one run: which of them has died, where the others notice it by an error of the network."""

from __future__ import annotations

import os
import signal
from typing import Any

# Who started this process; another one has taken over if it died.
_PARENT = os.getppid()


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
