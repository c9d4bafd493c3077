"""How far something slow is that no trainer looks after: a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

# Seconds between two lines. What takes longer, an iteration of PPO, say, has a line each time.
EVERY = 10.0


def watched(items: Sequence[T], title: str) -> Iterator[T]:
    """The items; after one that ends `EVERY` seconds after the last line, another line says how many are done.

    Args:
        items: What is worked through.
        title: What they are.
    """
    started = said = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - said >= EVERY and done < len(items):
            said = now
            print(f"{title} {done} of {len(items)}, {clock(now - started)}", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds, and hours if there are any."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
