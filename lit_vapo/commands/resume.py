"""Which checkpoint a run goes on from, and whether there is anything left to do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_vapo.callbacks.checkpoint_files import BEST, LAST, iteration_of
from lit_vapo.commands.run_folder import FINISHED
from lit_vapo.stages.checkpoint_file import read_checkpoint

WORDS = ("best", "last")
# What says when a run is over.
ENDS = ("max_epochs", "max_steps", "max_time")


class NothingToDoError(Exception):
    """The run has nothing left to do."""


class Found(NamedTuple):
    """A checkpoint of a run.

    Attributes:
        path: The file.
        contents: What it holds.
    """

    path: Path
    contents: Mapping[str, Any]

    @property
    def run_state(self) -> dict[str, Any]:
        """What the run noted of itself."""
        states: dict[str, Any] = self.contents.get("callbacks", {})
        return dict(states.get("RunCheckpoint", {}))

    @property
    def iteration(self) -> int | None:
        """Batches that were trained on."""
        progress = self.contents.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
        count = progress.get("total", {}).get("completed")
        return None if count is None else int(count)


def newest_whole(checkpoints: Path, option: str) -> Found | None:
    """The newest checkpoint of a folder that can be read; those that cannot are named.

    Args:
        checkpoints: Folder of a run's checkpoints.
        option: What asks for it, for the message.
    """
    for path in _newest_first(checkpoints):
        try:
            return read(path, option)
        except ValueError as error:
            rank_zero_warn(f"{error}; the one before it is taken")
    return None


def read(path: Path, option: str) -> Found:
    """A checkpoint and what it holds.

    Raises:
        ValueError: It cannot be read.
    """
    return Found(path, read_checkpoint(path, option))


def _newest_first(checkpoints: Path) -> Iterator[Path]:
    """The files that names and links mean, each once: what `last` means, and then by number."""
    found = {path.resolve() for path in checkpoints.glob("*.ckpt") if path.exists()}
    last = (checkpoints / LAST).resolve()

    def age(path: Path) -> tuple[bool, int, float]:
        number = iteration_of(path)
        return path == last, -1 if number is None else number, path.stat().st_mtime

    return iter(sorted(found, key=age, reverse=True))


def checkpoint_meant(word: str, checkpoints: Path) -> Found:
    """The checkpoint that `last` or `best` means in a folder of checkpoints.

    Raises:
        ValueError: There is none, or the best one cannot be read.
    """
    if word == "best":
        path = checkpoints / BEST
        if path.is_file():
            return read(path.resolve(), "--ckpt_path")
        kept = "a run that kept its best checkpoint (checkpoint.monitor)"
        raise ValueError(f"--ckpt_path: expected {kept}, got {checkpoints}; give the file, or the word 'last'")
    found = newest_whole(checkpoints, "--ckpt_path")
    if found is None:
        raise ValueError(
            f"--ckpt_path: expected a run with a checkpoint in {checkpoints} for the word 'last', got none"
        )
    return found


def ends(trainer: Mapping[str, Any]) -> dict[str, str]:
    """When a run with these options of the trainer is over."""
    return {name: str(trainer.get(name)) for name in ENDS}


def is_finished(record: Path, trainer: Mapping[str, Any]) -> bool:
    """Whether a run has written that it is over, and was to go no further than this one."""
    if not record.is_file():
        return False
    found = json.loads(record.read_text(encoding="utf-8"))
    return bool(found.get("ends", ends(trainer)) == ends(trainer))


def found_to_resume(config: Any, root: Path, checkpoints: Path) -> Found | None:
    """The checkpoint from which `--resume` goes on, if there is one; says which.

    Args:
        config: The options of the run.
        root: Its folder.
        checkpoints: Folder of its checkpoints.

    Raises:
        ValueError: Another checkpoint is asked for, or the run is to be replaced.
        NothingToDoError: It is finished.
    """
    for name in ("ckpt_path", "overwrite"):
        if config[name]:
            raise ValueError(f"--resume: expected neither ckpt_path nor overwrite beside it, got {name}")
    if is_finished(root / FINISHED, config["trainer"]):
        rank_zero_info(f"resume: the run in {root} is finished; there is nothing left to do")
        raise NothingToDoError
    found = newest_whole(checkpoints, "--resume")
    if found is None and any(checkpoints.glob("*.ckpt")):
        raise ValueError(
            f"--resume: expected a checkpoint that can be read in {checkpoints}, got none; begin anew with "
            "--overwrite=true, or in another folder"
        )
    if found is None:
        rank_zero_info(f"resume: there is no checkpoint in {checkpoints} yet; the run begins")
    else:
        rank_zero_info(f"resume: the run goes on from {found.path}, after iteration {found.iteration}")
    return found
