"""The files of a run's checkpoints: their names, the links to them, and which of them stay."""

from __future__ import annotations

import shutil
from pathlib import Path

from lit_vapo.callbacks.whole_io import link

NAME, PATTERN = "iteration={:06d}.ckpt", "iteration=*.ckpt"
LAST, BEST = "last.ckpt", "best.ckpt"


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
    there = sorted(folder.glob(PATTERN), key=lambda path: (len(path.name), path.name))
    kept = {path.name for path in there[-count:]} | {newest, best}
    for path in there:
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
