"""What somebody who mistyped an option may have meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from inspect import isabstract, signature
from typing import Any, get_args

from jsonargparse import ArgumentParser

UNKNOWN = re.compile(r"unrecognized arguments: (.*)")
KEY = re.compile(r"does not accept option '([\w.]+)'")
CLASS = re.compile(r'key "([\w.]+)":.*Expected a dot import path string: ([\w.]+)', re.DOTALL)
PLACE = re.compile(r'key "([\w.]+)":')
ARGUMENT = re.compile(r"class_path '([\w.]+)':\s*Option '(\w+)' is not accepted")


def hinted(message: str, parser: ArgumentParser) -> str:
    """The message of a parser, shorter where that is possible, with the nearest names there are.

    Args:
        message: What the parser says.
        parser: The one that refused.
    """
    if found := UNKNOWN.search(message):
        words = [word.partition("=")[0] for word in found[1].split() if word.startswith("--")]
        options = [option for option in _options(parser) if option.startswith("--")]
        return message + "".join(_nearest(word, options) for word in words)
    if found := KEY.search(message):
        return message + _nearest(found[1], [option.removeprefix("--") for option in _options(parser)])
    if found := ARGUMENT.search(message):
        module, _, name = found[1].rpartition(".")
        names = list(signature(getattr(import_module(module), name)).parameters)
        key = PLACE.search(message)
        listed = f"{key[1]}: " if key else ""
        listed += f"expected an option of {name} ({', '.join(names) or 'it has none'}), got {found[2]!r}"
        return listed + _nearest(found[2], names)
    if found := CLASS.search(message):
        names = sorted({c.__name__ for base in _classes(parser, found[1]) for c in _subclasses(base)})
        if names:
            what = f"{found[1]}: expected one of {', '.join(names)}, or a class of yours by its import path"
            return f"{what}, got {found[2]!r}{_nearest(found[2], names)}"
    return message


def _nearest(word: str, names: Iterable[str]) -> str:
    close = get_close_matches(word, list(names), n=1, cutoff=0.7)
    return f"\nDid you mean {close[0]}?" if close else ""


def _options(parser: Any) -> list[str]:
    return list(parser._option_string_actions)


def _classes(parser: Any, key: str) -> list[type]:
    """The classes that an option takes a subclass of."""
    action = parser._option_string_actions.get(f"--{key}")
    kind: Any = getattr(action, "_typehint", None)
    return [c for c in (kind, *get_args(kind)) if isinstance(c, type) and c is not type(None)]


def _subclasses(base: type) -> Iterator[type]:
    """All of ours that can be made; those of others are too many to list."""
    kind: type
    for kind in base.__subclasses__():
        if kind.__module__.startswith("lit_vapo.") and not isabstract(kind) and not kind.__name__.startswith("_"):
            yield kind
        yield from _subclasses(kind)
