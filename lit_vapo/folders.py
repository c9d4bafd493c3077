"""Folders and files that are written whole or not at all; a folder never over something that is there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

NO_SPACE = os.strerror(errno.ENOSPC)


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


def absolute(place: str) -> str:
    """A folder that is there by its absolute path; anything else, a hub name, say, as it is."""
    path = os.path.expanduser(place)
    return os.path.abspath(path) if os.path.isdir(path) else place


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
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if NO_SPACE in str(error) and not isinstance(error, OSError):
            # Writers of weights have errors of their own for what the system said.
            raise OSError(errno.ENOSPC, NO_SPACE, str(target)) from error
        raise
    if target.exists():
        target.rmdir()
    partial.replace(target)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which others see when the block ends: whole, in place of one that is there, or not at all.

    Raises:
        OSError: It cannot be written.
    """
    # A name that no other process has, on any machine that sees the folder, and that no pattern of results matches.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        # A write that fails does not say where.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file that others see whole or not at all, in place of one that is there.

    Args:
        path: The file; its folder is made if need be.
        content: What it says, a text in UTF-8.
    """
    with whole_file(Path(path)) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def claim_folder(folder: str | Path, name: str, options: Mapping[str, Any]) -> None:
    """Note in a folder which options its contents come from; refuse one whose contents come from others.

    Args:
        folder: Where somebody wants to write, or has written with these options before.
        name: The option that says so, for the message.
        options: What the contents depend on, by name; JSON can say it.

    Raises:
        ValueError: It was made with other options.
    """
    path = Path(folder) / "options.json"
    there = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else options
    differ = [f"{key} {there.get(key)}" for key, value in options.items() if there.get(key) != value]
    if differ:
        raise ValueError(
            f"{name}: {str(folder)!r} was made with {', '.join(differ)}; expected another folder, or these values"
        )
    write_whole(path, json.dumps(options, indent=2) + "\n")
