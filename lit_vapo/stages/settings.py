"""The settings of a module as a checkpoint holds them: numbers, texts, lists and dicts."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType
from typing import Any


def plain(value: Any) -> Any:
    """A setting as numbers, strings, lists and dicts, so that reading a checkpoint runs no pickled code.

    An object becomes its class path and constructor arguments, read back from attributes of the same names; a class
    or function, or `partial` of one, its path and the arguments it keeps. A class path names the module that the
    class is written in, where a folder exports it under a shorter one.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {key: _written_in(x) if key == "class_path" else plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    if isinstance(value, partial):
        return {"class_path": _path(value.func), "init_args": plain(value.keywords)}
    if isinstance(value, (type, FunctionType)):
        return {"class_path": _path(value)}
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    names = [name for name in inspect.signature(type(value).__init__).parameters if hasattr(value, name)]
    return {"class_path": _path(type(value)), "init_args": {name: plain(getattr(value, name)) for name in names}}


def _path(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _written_in(class_path: Any) -> Any:
    """The path of a class that is loaded, by the module it is written in; any other stays. Nothing is imported."""
    module, _, name = str(class_path).rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    return _path(kind) if isinstance(kind, type) else class_path


@contextmanager
def unpickled() -> Iterator[None]:
    """Silence Lightning's remark on modules among the hyperparameters: the command line stores their class path."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is an instance of `nn.Module`.*")
        yield
