"""How a command ends and prints: errors of users are one message, and streams outlive their readers and encodings."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from opcode import opname
from pathlib import Path
from typing import Any, TextIO

DEBUG = "LIT_VAPO_DEBUG"
FAILED, USAGE_ERROR = 1, 2
# 128 and the number of the signal, as shells have it: SIGINT, SIGUSR1, SIGTERM.
INTERRUPTED, REQUEUED, TERMINATED = 130, 138, 143
# Whose `raise` speaks to users: this package's, and that of the reader of options.
SPEAKERS = {Path(__file__).parent.name, "jsonargparse"}


@contextmanager
def reported() -> Iterator[None]:
    """A block whose errors of users are one message on stderr and exit code 2, without a traceback.

    An error of the user is a `ValueError` or `FileExistsError` that this package raises itself, and whatever the
    operating system refuses. Everything else is a bug, here or elsewhere, and keeps its traceback. With LIT_VAPO_DEBUG
    set all of them do.

    Raises:
        SystemExit: With code 2 after an error of the user, and 130 after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if os.environ.get(DEBUG):
            raise
        raise SystemExit(INTERRUPTED) from error
    except (ValueError, OSError) as error:
        if not meant(error):
            raise
        if os.environ.get(DEBUG):
            traceback.print_exc()
        complain(said(error))
        raise SystemExit(USAGE_ERROR) from error


def complain(message: str) -> None:
    """Print an error of the user."""
    # Each process of a distributed run has errors of its own, a loss that is not finite, say.
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    print(f"lit-vapo: error: {message}" + (f" (process {rank})" if rank else ""), file=sys.stderr)


def meant(error: ValueError | OSError) -> bool:
    """Whether an error is a sentence for the user, rather than a surprise."""
    if isinstance(error, OSError) and error.errno is not None:
        return True
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or last.tb_frame.f_globals.get("__name__", "").partition(".")[0] not in SPEAKERS:
        return False
    # A `raise` that stands there is meant; what other statements raise is a surprise.
    return opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def said(error: Exception) -> str:
    """The sentence of an error; the operating system's own with the file first, as in all others."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


class _Raw(io.FileIO):
    """A stream that swallows what nobody reads any more."""

    def write(self, data: Any, /) -> int:
        """Write, or drop everything from now on once the reader has gone."""
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


def lasting(stream: TextIO) -> TextIO:
    """A standard stream that neither a reader that goes away nor a letter it cannot encode brings down."""
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Raw(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors="replace",
        line_buffering=True,
    )


def visible(text: str, kept: str = "") -> str:
    """A text whose control characters are shown, but for those that are kept."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)
