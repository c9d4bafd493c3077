"""The files of a run's checkpoints: their names, the links to them, and which of them stay."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from lit_vapo.callbacks.whole_io import link

NAME = "iteration={:06d}.ckpt"
LAST, BEST = "last.ckpt", "best.ckpt"


def iteration_of(path: Path) -> int | None:
    """How many iterations a checkpoint has behind it, by its name; `None` where that does not say."""
    number = re.fullmatch(r"iteration=(\d+)\.ckpt", path.name)
    return None if number is None else int(number[1])


def keep(folder: Path, newest: str, best: str, count: int) -> None:
    """Let `last` and `best` mean what they should, and remove what is neither, nor new.

    Args:
        folder: Where checkpoints are.
        newest: Name of the newest.
        best: Name of the best; empty where there is none.
        count: How many of those with the highest numbers stay besides.
    """
    link(folder / newest, LAST)
    if best and (folder / best).exists() and (folder / BEST).resolve().name != best:
        link(folder / best, BEST)
    there = {number: path for path in folder.iterdir() if (number := iteration_of(path)) is not None}
    kept = {there[number].name for number in sorted(there)[-count:]} | {newest, best}
    for path in there.values():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
