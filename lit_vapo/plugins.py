"""Folders of classes to choose from: every file in them is found."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable


def import_all(package: str, path: Iterable[str], ending: str = "") -> None:
    """Import every module of a folder.

    A class can then be chosen by its own name (`--model.objective=VarianceAware`), since the reader of options looks
    among the subclasses that are loaded. A new file is found like the others, without a list to keep.

    Args:
        package: `__name__` of the folder's package.
        path: Its `__path__`.
        ending: Only modules whose names end so.
    """
    for module in pkgutil.iter_modules(path):
        if module.name.endswith(ending):
            importlib.import_module(f"{package}.{module.name}")
