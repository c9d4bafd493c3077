"""Reading a checkpoint file: what is torn, damaged or something else is refused before any model is loaded."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from lit_vapo.integrity import fault_of
from lit_vapo.models.older import update_checkpoint
from lit_vapo.models.settings import every_dict, explain

STAGE_KEY = "lit_vapo_stage"
FIGURES_KEY = "lit_vapo_figures"


class _Contents(BaseModel):
    """What a checkpoint holds, as far as anything here reads it."""

    model_config = ConfigDict(extra="allow", strict=True, arbitrary_types_allowed=True)

    state_dict: dict[str, Tensor]
    hyper_parameters: dict[str, Any]
    stage: str | None = Field(None, alias="lit_vapo_stage")
    figures: dict[str, float] = Field({}, alias="lit_vapo_figures")
    lightning: str = Field(alias="pytorch-lightning_version", pattern=r"^\d+(\.\d+)+")
    epoch: int = Field(ge=0)
    global_step: int = Field(ge=0)
    loops: dict[str, Any] = {}
    callbacks: dict[str, Any] = {}
    optimizer_states: list[dict[str, Any]] = []
    lr_schedulers: list[dict[str, Any]] = []


class _UnreadableError(Exception):
    """A checkpoint cannot be read; says why."""


def read_checkpoint(path: str | Path, option: str) -> dict[str, Any]:
    """The contents of a checkpoint, its tensors left in the file until they are used.

    Every byte is read once to compare the checksums that `torch.save` wrote, at the speed of the disk or about
    1.4 GB/s. No pickled code is run.

    Args:
        path: The file.
        option: What named it (`--checkpoint`), for the message.

    Raises:
        ValueError: It is no checkpoint, it was damaged, or a weight in it is not finite.
    """
    path = Path(path)
    try:
        if not path.is_file() or not zipfile.is_zipfile(path):
            raise _UnreadableError(fault_of(path))
        _check_archive(path)
        checkpoint = _unpickle(path)
        _check_contents(checkpoint)
    except _UnreadableError as error:
        raise ValueError(
            f"{option}: expected a checkpoint, got {str(path)!r}, which cannot be read ({error})"
        ) from None
    update_checkpoint(checkpoint)
    return checkpoint


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
            # What is stored as it is takes its size in the file, so no part can unfold to more than there is.
            if not stored or sum(part.file_size for part in parts) > path.stat().st_size:
                raise _UnreadableError("its parts are not stored as `torch.save` stores them")
            damaged = archive.testzip()
    except _UnreadableError:
        raise
    except Exception:
        # The reader of archives raises many kinds, none of which says more.
        raise _UnreadableError("it is torn or damaged") from None
    if damaged is not None:
        raise _UnreadableError(f"its part {damaged!r} was damaged after it was written")


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        # Whatever a hostile file makes the reader raise; its advice, to read it without this protection, is bad.
        raise _UnreadableError("it holds something other than tensors, numbers, texts, lists and dicts") from None
    if not isinstance(contents, dict) or not all(isinstance(key, str) for key in contents):
        raise _UnreadableError("it does not hold a dict of the parts of a checkpoint")
    return contents


def _check_contents(checkpoint: dict[str, Any]) -> None:
    try:
        contents = _Contents.model_validate(checkpoint)
        for part in (contents.hyper_parameters, contents.loops, contents.callbacks):
            for _ in every_dict(part, "its settings"):
                pass
    except ValidationError as error:
        raise _UnreadableError(explain(error)) from None
    except ValueError as error:
        raise _UnreadableError(str(error)) from None
    for name, tensor in contents.state_dict.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise _UnreadableError(f"state_dict.{name}: expected an ordinary tensor, got {tensor.layout}")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise _UnreadableError(f"state_dict.{name}: expected all its values in the file, got some")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise _UnreadableError(f"state_dict.{name}: expected finite weights, got NaN or infinity")
