"""What the processes of a run tell each other outside of training: none goes on alone, and none waits for another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if _several() else 0


def of_all(found: T) -> list[T]:
    """What each process found, in their order."""
    if not _several():
        return [found]
    told: list[T | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(told, found)
    return told  # type: ignore[return-value]


def rows_of_all(x: Tensor) -> Tensor:
    """Rows of all processes (N, …), in their order."""
    return torch.cat([rows.to(x.device) for rows in of_all(x)])


@contextmanager
def together() -> Iterator[None]:
    """A block that all processes run, each its own part: where one fails, all do.

    Raises:
        Exception: What this process ran into.
        ValueError: What another one did, with its number.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    said = of_all(None if failed is None else str(failed))
    if failed is not None:
        raise failed
    for number, message in enumerate(said):
        if message is not None:
            raise ValueError(f"process {number}: {message}")


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
