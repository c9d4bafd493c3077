"""Checkpoint files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lit_vapo.folders import whole_file

PARTIAL = ".{}.partial"
# What a file system says that has no links.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its destination and moves it there when it is complete.

    Lightning's own goes through the folder for temporary files: one that is small ends the run, and from another file
    system the last step is a copy that a full disk or a kill tears.

    `torch.save` writes a checksum of each part, which `read_checkpoint` compares.

    Attributes:
        failure: Why the last checkpoint could not be written, for who asks (`keep_failure`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: OSError | None = None
        self.keep_failure = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save, whole or not at all; the checkpoint that was there before stays until then.

        Raises:
            OSError: It cannot be written. With `keep_failure` it is kept instead: of several processes one writes, and
                the others wait for it.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        self.failure = None
        try:
            with whole_file(Path(path)) as file:
                torch.save(checkpoint, file)
            sync_folder(Path(path).parent)
        except OSError as error:
            self.failure = error
            if not self.keep_failure:
                raise


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, not only the files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link(path: Path, name: str) -> None:
    """Let a name in a file's folder mean that file, in one step; where links cannot be, a copy that is whole."""
    target = path.with_name(name)
    partial = path.with_name(PARTIAL.format(name))
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(path.name)
        partial.replace(target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with path.open("rb") as source, whole_file(target) as file:
            shutil.copyfileobj(source, file, 1 << 24)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def tried(act: Callable[[], object]) -> OSError | None:
    """Why something could not be written, if it could not."""
    try:
        act()
    except OSError as error:
        return error
    return None
