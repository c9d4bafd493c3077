"""Folders and files that are written whole or not at all; a folder never over something that is there."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new(folder: str | Path, name: str) -> Path:
    """The folder as a path, if there is nothing in it.

    Args:
        folder: Where somebody wants to write.
        name: The option that says so, for the message.

    Raises:
        FileExistsError: There are files in it.
    """
    path = Path(folder)
    if path.exists() and any(path.iterdir()):
        raise FileExistsError(f"{name}: expected a new or empty folder, got {str(folder)!r} with files in it")
    return path


@contextmanager
def new_folder(folder: str | Path, name: str) -> Iterator[Path]:
    """A folder to write into, which takes its place when the block ends; after an error nothing is left of it.

    Raises:
        FileExistsError: There are files in it.
    """
    target = check_new(folder, name)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if target.exists():
        target.rmdir()
    partial.replace(target)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file that others see whole or not at all, in place of one that is there.

    Args:
        path: The file; its folder is made if need be.
        content: What it says, a text in UTF-8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that no other process has, on any machine that sees the folder, and that no pattern of results matches.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
