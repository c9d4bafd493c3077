"""Tensors in safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_vapo.folders import let_read
from lit_vapo.integrity import fault_of


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in a file, without reading the tensors.

    Raises:
        ValueError: The file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception:
        raise _unreadable(path) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU.

    Raises:
        ValueError: The file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception:
        # The reader's own words name no file.
        raise _unreadable(path) from None


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says beside its tensors.

    Raises:
        ValueError: The file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception:
        raise _unreadable(path) from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors for whoever may read the folder; the library would write them for their owner alone.

    Args:
        path: The file.
        tensors: By name.
        metadata: What it is to say beside them.
    """
    given = None if metadata is None else dict(metadata)
    save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata=given)
    let_read(path)


def check_finite(tensors: Mapping[str, Tensor], path: Path, largest: float = float("inf")) -> None:
    """Refuse weights that are not numbers, or that are absurd.

    Args:
        tensors: What was read.
        path: From where, for the message.
        largest: Largest absolute value that makes sense.

    Raises:
        ValueError: There is one; the message names the tensor.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        most = float(tensor.abs().max())
        # NaN is above nothing.
        if not most <= min(largest, torch.finfo(tensor.dtype).max):
            raise ValueError(f"{path}: expected {name} to be finite and at most {largest:g}, got {most:g}")


def _unreadable(path: Path) -> ValueError:
    return ValueError(f"{path}: expected tensors (safetensors), got a file that cannot be read ({fault_of(path)})")
