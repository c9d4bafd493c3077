"""Files that are not what they should be: how that is noticed, and said."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# What a digest reads of a large file: as many blocks spread over it. Weights that were trained further differ in all.
BLOCK, BLOCKS = 1 << 16, 64
LFS = b"version https://git-lfs.github.com/spec/"


def fault_of(path: str | Path) -> str:
    """Why a file cannot be read, as far as a look at it tells, in words that follow `which cannot be read`.

    Args:
        path: A file whose reader gave up on it.
    """
    path = Path(path)
    if path.is_dir():
        return "it is a folder"
    if not path.exists():
        return "it does not exist"
    if not path.is_file():
        return "it is not an ordinary file"
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "it is empty"
    if start.startswith(LFS):
        return f"it is a Git LFS pointer of {size} bytes; `git lfs pull` fetches what it stands for"
    # Every binary format that is read here has zero bytes in its first line.
    return "it is a text file" if b"\0" not in start and start.isascii() else "it is torn or damaged"


def fingerprint(paths: Iterable[Path]) -> str:
    """A digest of files: their names, lengths, and 4 MB of each, at the cost of reading these.

    Args:
        paths: The files.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.name}:".encode())
        _read_into(digest, path)
    return digest.hexdigest()


def contents_fingerprint(path: Path) -> str:
    """A digest of a file, or of a folder's files, whatever its own name is; it reads as much as `fingerprint`."""
    if path.is_dir():
        return fingerprint(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    _read_into(digest, path)
    return digest.hexdigest()


def _read_into(digest: Any, path: Path) -> None:
    """Add a file's length and 4 MB of it to a digest."""
    size = path.stat().st_size
    digest.update(f"{size};".encode())
    with path.open("rb") as file:
        if size <= BLOCK * BLOCKS:
            digest.update(file.read())
        else:
            for i in range(BLOCKS):
                file.seek((size - BLOCK) * i // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
