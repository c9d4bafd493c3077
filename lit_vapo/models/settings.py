"""From settings in a file to objects: checked by one schema each, and built without a look at anything else.

Settings are what JSON can say. An argument that is a dataclass is a dict of its fields; one that is a class to choose
is `{"class_path": …, "init_args": {…}}`. Whoever reads settings that others wrote asks `check_trusted` first.
"""

from __future__ import annotations

import importlib
import inspect
import json
import types
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import (
    Annotated,
    Any,
    NotRequired,
    Required,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import BaseModel, ConfigDict, PlainValidator, TypeAdapter, ValidationError
from typing_extensions import TypedDict

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
# More than any configuration has.
MOST_SETTINGS, DEEPEST = 100_000, 50
# Settings that name a folder, or a model on the hub; under the last they do so by names of the user's.
PATHS = ("path", "folder", "reward", "policy", "feature_cache", "sources")
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


class Component(BaseModel):
    """A class and what it is made with."""

    model_config = STRICT

    class_path: str
    init_args: dict[str, Any] = {}


def read_settings(path: Path, schema: type[M]) -> M:
    """Read a JSON file.

    Args:
        path: The file.
        schema: What it should say.

    Raises:
        ValueError: It cannot be read, or says something else; the message names file, key, expected and received.
    """
    try:
        return schema.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from None
    except OSError as error:
        raise ValueError(f"{path}: expected a file that can be read, got {error.strerror}") from None


def explain(error: ValidationError) -> str:
    """The first thing that is wrong, as `key: expected …, got …`."""
    first = error.errors(include_url=False)[0]
    key = "".join(f"{part}." for part in map(str, first["loc"]))[:-1]
    said = str(first["msg"])
    if first["type"] == "missing" or first["type"] == "missing_argument":
        reason = "expected this key, got none"
    elif first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        reason = "expected no such key"
    elif first["type"] == "value_error":
        # Said by a check of our own.
        reason = said.removeprefix("Value error, ")
    else:
        reason = f"{said.replace('Input should be', 'expected', 1)}, got {shortened(first['input'])}"
    return f"{key}: {reason}" if key else reason


def shortened(value: Any) -> str:
    """A value as Python writes it, or how it begins."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def whole_paths(settings: Any, key: str = "") -> Any:
    """Settings in which every model's folder is an absolute path, so that they mean the same wherever they are read.

    Args:
        settings: Dicts, lists, texts and numbers.
        key: What the settings stand under.
    """
    if isinstance(settings, dict):
        named = key == PATHS[-1]
        return {
            name: whole_paths(value, key if named and isinstance(value, str) else name)
            for name, value in settings.items()
        }
    if isinstance(settings, (list, tuple)):
        return [whole_paths(value) for value in settings]
    if key in PATHS and isinstance(settings, str) and Path(settings).expanduser().is_dir():
        return str(Path(settings).expanduser().resolve())
    return settings


def every_dict(settings: Any, asker: str) -> Iterator[dict[Any, Any]]:
    """Every dict in some settings, however deep.

    Args:
        settings: Dicts, lists, texts and numbers.
        asker: Whose settings they are, for the message.

    Raises:
        ValueError: There are too many, or they are too deep: one list that stands in many places has no end.
    """
    waiting, seen = [(settings, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if seen > MOST_SETTINGS or depth > DEEPEST:
            raise ValueError(f"{asker}: expected at most {MOST_SETTINGS} settings, {DEEPEST} deep, got more")
        if isinstance(value, dict):
            yield value
            waiting.extend((x, depth + 1) for x in value.values())
        elif isinstance(value, (list, tuple, set)):
            waiting.extend((x, depth + 1) for x in value)


def construct(kind: Callable[..., T], arguments: dict[str, Any]) -> T:
    """Call a class with settings, each checked against the annotation of the parameter and made into what it says.

    Numbers are finite and of the kind that is asked for; a key that is no parameter is refused.

    Args:
        kind: The class.
        arguments: Its settings by parameter.

    Raises:
        ValueError: A setting is missing, unknown, of another type or out of range; the message names it.
    """
    try:
        text = json.dumps(arguments)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"expected settings that JSON can say, got others ({error})") from None
    try:
        # From text: so that a list may stand for a tuple, and nothing but a number for a number.
        given = _schema(kind).validate_json(text)
    except ValidationError as error:
        raise ValueError(explain(error)) from None
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"expected what {kind.__qualname__} can be made with, got {error}") from error


def make(base: type[T], component: Component) -> T:
    """Import a class and construct it.

    Args:
        base: What it should be a subclass of.
        component: The class and its settings, trusted already.

    Raises:
        ValueError: There is no such class, it is something else, or a setting does not fit.
    """
    kind = import_class(base, component.class_path)
    try:
        return construct(kind, component.init_args)
    except ValueError as error:
        raise ValueError(f"init_args.{error}") from error


def import_class(base: type[T], class_path: str) -> type[T]:
    """Import a class, which was trusted already.

    Raises:
        ValueError: There is no such class, or it is no subclass of `base`.
    """
    module, _, name = class_path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"class_path: expected a class that can be imported, got {class_path!r} ({error})") from error
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ValueError(f"class_path: expected a subclass of {base.__name__}, got {class_path}")
    return kind


def _schema(kind: Callable[..., Any]) -> TypeAdapter[dict[str, Any]]:
    """A schema of what a class is made with."""
    constructor = cast("Any", kind).__init__
    try:
        hints = get_type_hints(constructor, include_extras=True)
    except NameError:
        # Annotations of somebody's class that only a type checker can follow.
        hints = {}
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    keys = {
        p.name: (Required if p.default is p.empty else NotRequired)[_annotation(hints.get(p.name, Any))] for p in named
    }
    schema = cast("Any", TypedDict)("Settings", keys)
    schema.__pydantic_config__ = STRICT
    return TypeAdapter(schema)


def _annotation(annotation: Any) -> Any:
    """The annotation, with each class to choose in place of an instance of it."""
    if get_origin(annotation) is dict:
        names, value = get_args(annotation)
        made = _annotation(value)
        return annotation if made is value else cast("Any", dict)[names, made]
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    chosen = [option for option in options if _is_chosen(option)]
    if not chosen:
        return annotation
    others = tuple(option for option in options if option in (type(None), str))
    return Annotated[Any, PlainValidator(partial(_make, chosen[0], others))]


def _is_chosen(annotation: Any) -> bool:
    return (
        isinstance(annotation, type)
        and annotation is not Any
        and annotation.__module__ not in ("builtins", "pathlib", "types")
        and not (is_dataclass(annotation) or get_origin(annotation) is not None)
    )


def _make(base: type[T], others: tuple[type, ...], value: Any) -> Any:
    if isinstance(value, others):
        return value
    try:
        component = Component.model_validate(value)
    except ValidationError as error:
        raise ValueError(explain(error)) from None
    return make(base, component)
