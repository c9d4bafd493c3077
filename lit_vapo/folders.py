"""Folders and files that are written whole or not at all; a folder never over something that is there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

NO_SPACE = os.strerror(errno.ENOSPC)
# The environment variable with folders, divided as in PATH, in which models are looked for that have moved.
MODELS = "LIT_VAPO_MODELS"


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
    """A folder that is there, or has moved, by its absolute path; anything else, a hub name, say, as it is."""
    path = os.path.expanduser(place)
    found = path if os.path.isdir(path) else moved(path)
    return place if found is None else os.path.abspath(found)


def moved(path: str) -> str | None:
    """Where a folder is now that was remembered by an absolute path, on another machine or outside of a container, say.

    It is looked for below the folders of `LIT_VAPO_MODELS`: by as much of its path as is there, at least its name.
    """
    if not os.path.isabs(path):
        return None
    parts = Path(path).parts[1:]
    homes = [home for home in os.environ.get(MODELS, "").split(os.pathsep) if home]
    for start in range(len(parts)):
        for home in homes:
            found = os.path.join(home, *parts[start:])
            if os.path.isdir(found):
                warnings.warn(f"{path} is no folder here; {found} is taken for it ({MODELS})", stacklevel=2)
                return found
    return None


def if_moved(path: str | None) -> str:
    """How a sentence ends that says an absolute path names nothing here: with what to do."""
    gone = path is not None and os.path.isabs(path) and not os.path.exists(path)
    return f"; if it has moved, name the folder that it is in now in the environment variable {MODELS}" if gone else ""


def let_read(path: Path) -> None:
    """Give a file the mode of one that was opened to be written; libraries write weights for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


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
