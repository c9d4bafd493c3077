"""The folder of a run: who holds it, and what it holds already."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

FINISHED = "finished.json"
CLAIM = "running.json"
CHECKPOINTS = "checkpoints"
# Bytes that show whether a file system takes any more.
BLOCK = 4096
# What a run writes besides its logs and checkpoints.
PAGE = ("report.html", "report/curves.png", "report/distributions.png")
WRITTEN = ("samples_*.jsonl", "evaluations.csv", "overoptimisation.png", "test", *PAGE)


_held: set[Claim] = set()


def _let_go_in_child() -> None:
    """Close the files of locks: a process that prepares batches would keep them for some seconds after its parent."""
    for claim in _held:
        claim.file.close()


os.register_at_fork(after_in_child=_let_go_in_child)


class Claim:
    """A folder held against other runs.

    The system's lock on a file in it holds it, so that a process that dies, however it dies, lets it go. What the file
    says is for people. Where a file system has no locks, nothing is held.

    Args:
        folder: The folder; made if need be.

    Raises:
        ValueError: Another run holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / CLAIM
        folder.mkdir(parents=True, exist_ok=True)
        self.file = self._lock()
        self._holder = {"host": socket.gethostname(), "process": os.getpid(), "started": datetime.now(UTC).isoformat()}
        self.note()
        _held.add(self)

    def note(self, **more: Any) -> None:
        """Say who holds the folder, and more, to whoever looks into the file."""
        self.file.truncate(0)
        self.file.write(json.dumps({**self._holder, **more}) + "\n")
        self.file.flush()

    def _lock(self) -> IO[str]:
        while True:
            file = self.path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "a process that has just started"
                file.close()
                raise ValueError(
                    f"trainer.default_root_dir: expected a folder that no other run uses, got {self.folder}, held by "
                    f"{holder}. Choose another folder, or wait for its end."
                ) from None
            except OSError:
                return file
            # The holder before may have removed the file between opening and locking it.
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                return file
            file.close()

    def release(self, keep: bool = False) -> None:
        """Let the folder go, and remove it if nothing came into it.

        Args:
            keep: Leave the mark of a run that did not come to its first checkpoint.
        """
        if not keep:
            self.path.unlink(missing_ok=True)
        self.file.close()
        _held.discard(self)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def check_folders(root: Path, checkpoints: Path | None, features: str | None) -> None:
    """Refuse folders that a run could not write to.

    Args:
        root: The run's own.
        checkpoints: That of its checkpoints, if it saves any.
        features: That of its features, if it has one of its own; one that holds some may be there to be read.

    Raises:
        ValueError: The system refuses one of them.
    """
    _check_writable(root, "trainer.default_root_dir")
    if checkpoints is not None:
        _check_writable(checkpoints, "checkpoint.dirpath")
    if features and not (os.path.isdir(features) and os.listdir(features)):
        _check_writable(Path(features), "model.feature_cache")


def _check_writable(folder: Path, key: str) -> None:
    """Refuse a folder in which nothing can be written, or nothing more: what a run finds out after hours else.

    A block is written and taken away again, since neither permissions nor free space tell of quotas and mounts. The
    folder need not exist, and is not made.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(BLOCK))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"{key}: expected a folder that can be written to, got {folder}: {error.strerror or error}"
        ) from error


def held_by_run(root: Path, checkpoints: Path) -> list[Path]:
    """The marks of a run: that it finished, and its checkpoints."""
    return [path for path in (root / FINISHED, *sorted(checkpoints.glob("*.ckpt"))) if path.exists()]


def refuse_foreign(root: Path, checkpoints: Path, resumed: bool) -> None:
    """Refuse a folder of checkpoints outside the run's own that belongs to another run.

    Raises:
        ValueError: It holds checkpoints, and none of them is resumed; or a run that finished lives around it.
    """
    root, checkpoints = root.resolve(), checkpoints.resolve()
    if checkpoints.is_relative_to(root):
        return
    others = [folder for folder in (checkpoints, *checkpoints.parents) if not root.is_relative_to(folder)]
    found = [folder / FINISHED for folder in others if (folder / FINISHED).exists()]
    if not resumed:
        found += sorted(checkpoints.glob("*.ckpt"))
    if found:
        raise ValueError(
            f"checkpoint.dirpath: expected a folder of this run (null, for one in trainer.default_root_dir), got "
            f"{checkpoints}, and another run left {found[0]}, which is never replaced"
        )


def replaced_by_run(root: Path, held: list[Path]) -> list[Path]:
    """What a run that replaces another removes."""
    return [*held, *(path for pattern in WRITTEN for path in root.glob(pattern))]


def left_by_killed_run(root: Path) -> list[Path]:
    """What a run left that was killed before its first checkpoint: rows that the next one writes again."""
    try:
        logs = [root / name for name in json.loads((root / CLAIM).read_text(encoding="utf-8"))["logs"]]
    except (OSError, ValueError, TypeError, KeyError):
        # No run was killed here, or before it knew.
        logs = []
    # What the file says decides what is removed, and somebody else may have written it.
    home = (root / "logs").resolve()
    ours = [path for path in logs if path.resolve().parent == home and path.is_dir() and not path.is_symlink()]
    # What a test wrote is of another run.
    written = [path for path in replaced_by_run(root, []) if path.name != "test"]
    return [*ours, *written] if (root / CLAIM).exists() else []


def remove(paths: Iterable[Path]) -> None:
    """Remove files, links and folders."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
