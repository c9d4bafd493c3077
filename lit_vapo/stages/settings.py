"""The settings of a module as a checkpoint holds them: numbers, texts, lists and dicts."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any


def plain(value: Any) -> Any:
    """A setting as numbers, strings, lists and dicts, so that reading a checkpoint runs no pickled code.

    An object becomes its class path and constructor arguments, read back from attributes of the same names.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    names = [name for name in inspect.signature(type(value).__init__).parameters if hasattr(value, name)]
    class_path = f"{type(value).__module__}.{type(value).__qualname__}"
    return {"class_path": class_path, "init_args": {name: plain(getattr(value, name)) for name in names}}


@contextmanager
def unpickled() -> Iterator[None]:
    """Silence Lightning's remark on modules among the hyperparameters: the command line stores their class path."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is an instance of `nn.Module`.*")
        yield
