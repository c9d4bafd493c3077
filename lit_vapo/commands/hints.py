"""What somebody who mistyped an option may have meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from inspect import isabstract, signature
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

UNKNOWN = re.compile(r"unrecognized arguments: (.*)")
KEY = re.compile(r"does not accept option '([\w.]+)'")
CLASS = re.compile(r'key "([\w.]+)":.*Expected a dot import path string: ([\w.]+)', re.DOTALL)
PLACE = re.compile(r'key "([\w.]+)":')
ARGUMENT = re.compile(r"class_path '([\w.]+)':\s*Option '(\w+)' is not accepted")
MADE_LATER = re.compile(r"Option '(\w+)' is not accepted\. Got value: Namespace\(class_path='([\w.]+)'")
LEARNING_RATE = "\nThe learning rate is model.learning_rate."


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
        return _no_option(message, found[1], found[2])
    if found := MADE_LATER.search(message):
        # What it is called with is not for the user to say.
        return _no_option(message, found[2], found[1], skipped=("params", "lr", "optimizer"))
    if found := CLASS.search(message):
        names = sorted({c.__name__ for base in _classes(parser, found[1]) for c in _subclasses(base)})
        names += _words(parser, found[1])
        if names:
            what = f"{found[1]}: expected one of {', '.join(names)}, or a class of yours by its import path"
            return f"{what}, got {found[2]!r}{_nearest(found[2], names)}"
    return message


def _no_option(message: str, class_path: str, given: str, skipped: tuple[str, ...] = ()) -> str:
    """Name the options of a class in place of one that it does not have."""
    module, _, name = class_path.rpartition(".")
    names = [x for x in signature(getattr(import_module(module), name)).parameters if x not in skipped]
    key = PLACE.search(message)
    listed = f"{key[1]}: " if key else ""
    listed += f"expected an option of {name} ({', '.join(names) or 'it has none'}), got {given!r}"
    return listed + (LEARNING_RATE if given == "lr" and "lr" in skipped else _nearest(given, names))


def _nearest(word: str, names: Iterable[str]) -> str:
    """The nearest name, or those whose last part is nearest to that of the word, in a line."""
    ends: dict[str, list[str]] = {}
    for name in names:
        ends.setdefault(_last_part(name), []).append(name)
    close = get_close_matches(word, [name for found in ends.values() for name in found], n=1, cutoff=0.7)
    if not close:
        close = [name for end in get_close_matches(_last_part(word), ends, n=1, cutoff=0.7) for name in ends[end]]
    return f"\nDid you mean {' or '.join(close[:3])}?" if close else ""


def _last_part(name: str) -> str:
    return name.rpartition(".")[2].lstrip("-")


def _options(parser: Any) -> list[str]:
    """All options, with the fields of those that take a dataclass or null, which the parser does not list."""
    listed = [option for option in parser._option_string_actions if not option.endswith(".help")]
    kinds = ((option, kind) for option in listed for kind in _classes(parser, option.removeprefix("--")))
    return listed + [f"{option}.{field.name}" for option, kind in kinds if is_dataclass(kind) for field in fields(kind)]


def _kind(parser: Any, key: str) -> Any:
    """What an option takes."""
    return getattr(parser._option_string_actions.get(f"--{key}"), "_typehint", None)


def _words(parser: Any, key: str) -> list[str]:
    """The words that an option takes."""
    return [word for kind in get_args(_kind(parser, key)) if get_origin(kind) is Literal for word in get_args(kind)]


def _classes(parser: Any, key: str) -> list[type]:
    """The classes that an option takes a subclass of."""
    kind = _kind(parser, key)
    return [c for c in (kind, *get_args(kind)) if isinstance(c, type) and c is not type(None)]


def _subclasses(base: type) -> Iterator[type]:
    """All of ours that can be made; those of others are too many to list."""
    kind: type
    for kind in base.__subclasses__():
        if kind.__module__.startswith("lit_vapo.") and not isabstract(kind) and not kind.__name__.startswith("_"):
            yield kind
        yield from _subclasses(kind)
