"""A bound on the time that a block of code takes, in any thread."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TooLongError(Exception):
    """A block has been at work for too long."""


@contextmanager
def bounded(seconds: float, message: str) -> Iterator[None]:
    """Stop what this thread does in the block when time is up; loops in Python stop at once, a C function at its end.

    Args:
        seconds: The time there is.
        message: That of the error.

    Raises:
        ValueError: Time is up.
    """
    thread, lock = ctypes.c_ulong(threading.get_ident()), threading.Lock()
    raise_in_thread = ctypes.pythonapi.PyThreadState_SetAsyncExc
    done = late = False

    def stop() -> None:
        nonlocal late
        with lock:
            if not done:
                late = True
                raise_in_thread(thread, ctypes.py_object(TooLongError))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except TooLongError:
        late = False
        raise ValueError(message) from None
    finally:
        timer.cancel()
        with lock:
            done = True
            if late:
                # It came when the block had ended, and must not reach what follows.
                raise_in_thread(thread, None)
