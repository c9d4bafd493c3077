"""Parsers of options: short errors, `~` in every path, and YAML in which nothing is lost and nothing explodes."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, _postponed_annotations, get_loader, set_loader
from jsonargparse._paths import Path as ConfigPath

from lit_vapo.commands.hints import hinted
from lit_vapo.console import DEBUG, USAGE_ERROR, complain
from lit_vapo.folders import absolute
from lit_vapo.models.older import renamed
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.models.weights import check_model

MODEL = {field.name for field in fields(Pretrained)}
# Names of options that would be secrets: none of ours are, and what others' classes take is known by its name alone.
SECRET = re.compile("(^|_)(api_?key|password|passwd|secret|(access|api|auth|bearer|hf)_token)$", re.IGNORECASE)
# Far more than anybody writes; what is above was made to exhaust whoever reads it.
MAX_CHARACTERS, MAX_NODES, MAX_DEPTH = 1_000_000, 100_000, 100


class Parser(ArgumentParser):
    """A parser whose errors are one message, and for which `~` is the home folder in every option.

    Attributes:
        all_options: What prints them.
    """

    all_options = "--help"

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        # A mistyped option would be taken for the one it begins.
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and where help is, rather than all that could be given."""
        if not self.exit_on_error:
            # The parser of a part: that of the whole says which.
            super().error(message, ex)
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        if os.environ.get(DEBUG):
            traceback.print_exc()
        complain(f"{hinted(message, parser)}\nAll options: {parser.prog.replace(' [options]', '')} {self.all_options}")
        raise SystemExit(USAGE_ERROR) from ex

    def _load_config_parser_mode(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        """Read a file of options; of one that names none jsonargparse would not say which it is."""
        try:
            parsed: Namespace = super()._load_config_parser_mode(content, *args, **kwargs)
        except (TypeError, KeyError) as error:
            if not str(error).startswith(("Unexpected config", "Key must be a string")):
                raise
            place = getattr(content, "file", "options")
            raise TypeError(f"{place}: expected options by name (key: value), got something else") from error
        return parsed

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse, and put the home folder in place of `~` wherever a value begins with it."""
        parsed: Namespace = at_home(super().parse_args(*args, **kwargs))
        return parsed


def at_home(value: Any) -> Any:
    """Options with the home folder in place of `~`.

    A shell puts it there in `--key ~/x`, not in `--key=~/x`, and nobody does in a file. No option that is not a path
    begins with `~`, so that none needs to say that it is one.
    """
    if isinstance(value, Namespace):
        for key, inner in vars(value).items():
            setattr(value, key, at_home(inner))
        return value
    if isinstance(value, dict):
        return {at_home(key): at_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [at_home(inner) for inner in value]
    return os.path.expanduser(value) if type(value) is str and value.startswith("~") else value


def find_models(options: Any, key: str = "") -> Iterator[tuple[str, Namespace]]:
    """The settings that say which model to load, wherever they stand, each with its key."""
    if isinstance(options, Namespace):
        inner = vars(options)
        if inner.keys() >= MODEL:
            yield key, options
        for name, value in inner.items():
            yield from find_models(value, f"{key}.{name}" if key else name)


def check_models(options: Namespace) -> None:
    """Know the models' folders by their absolute paths, and refuse what is no whole model before anything is loaded.

    Raises:
        ValueError: One is missing, damaged or an adapter.
    """
    for key, model in find_models(options):
        model.path = absolute(model.path)
        check_model(model.path, f"{key}.path", model.revision)


def refuse_secrets(options: Any, key: str = "") -> None:
    """Refuse what is secret by its name: options are saved with a run, and others see them in lists of processes.

    Raises:
        ValueError: An option with such a name has a text.
    """
    if isinstance(options, Namespace):
        options = vars(options)
    if isinstance(options, dict):
        for name, value in options.items():
            place = f"{key}.{name}" if key else str(name)
            if isinstance(value, str) and value and SECRET.search(str(name)):
                raise ValueError(
                    f"{place}: expected no secret among the options, which are saved with the run, got one; put it "
                    "into an environment variable"
                )
            refuse_secrets(value, place)
    elif isinstance(options, list):
        for number, value in enumerate(options):
            refuse_secrets(value, f"{key}[{number}]")


# YAML.


class OptionsError(yaml.YAMLError):
    """A text of options that cannot be meant as it stands."""


class _FileText(str):
    """What a file says, and which it is."""

    file: str


def _read_text(path: ConfigPath) -> str:
    """The text of options, in UTF-8 whatever the locale is."""
    if path.is_url or path.is_fsspec or path.relative == "-":
        text = _FileText(_jsonargparse_read(path))
    else:
        try:
            text = _FileText(Path(path.absolute).read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise TypeError(f"{path}: expected a text in UTF-8, got {error.reason} at byte {error.start}") from error
    text.file = path.relative
    return text


def _load(text: str) -> Any:
    """Read YAML, as jsonargparse does, once it is known to be harmless.

    Raises:
        OptionsError: A key stands twice, the text is no YAML, or it is larger than options can be.
    """
    place = f"{text.file}, " if isinstance(text, _FileText) else ""
    if len(text) > MAX_CHARACTERS:
        raise OptionsError(f"{place}expected options of at most {MAX_CHARACTERS} characters, got {len(text)}")
    try:
        _check(str(text))
        value = renamed(_jsonargparse_load(str(text)))
    except OptionsError as error:
        raise OptionsError(f"{place}{error}") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise OptionsError(f"{place}{line}expected YAML, got {error.problem}") from error
    except Exception as error:  # what stands behind a tag (`!!int`, say) is read without a check
        raise OptionsError(f"{place}expected YAML, got {error}") from error
    # A file of comments alone sets nothing.
    if value is None and place:
        return {}
    # Elsewhere a text is null only where it says so: `#1` and `&a` are names.
    return str(text) if value is None and text.strip().lower() not in ("", "~", "null") else value


def _check(text: str) -> None:
    """Look at the events of a text, of which there are no more than it has characters; nothing is built.

    Raises:
        OptionsError: A key stands twice, or there are too many levels or values.
    """
    parents = [_Node(None)]
    sizes: dict[str | None, int] = {}
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        line = cast("yaml.Mark", event.start_mark).line + 1
        if isinstance(event, yaml.NodeEvent):
            parents[-1].see(event, line)
            parents.append(_Node(event))
        if isinstance(event, yaml.CollectionStartEvent):
            # An alias within what it stands for has no end.
            sizes[event.anchor] = MAX_NODES
        if isinstance(event, (yaml.ScalarEvent, yaml.AliasEvent, yaml.CollectionEndEvent)):
            node = parents.pop()
            size = sizes.get(node.anchor, 1) if isinstance(event, yaml.AliasEvent) else node.size
            sizes[node.anchor] = size
            parents[-1].size += size
        if len(parents) > MAX_DEPTH:
            raise OptionsError(f"line {line}: expected at most {MAX_DEPTH} levels, got more")
        if parents[-1].size > MAX_NODES:
            raise OptionsError(f"line {line}: expected at most {MAX_NODES} values, aliases spelt out, got more")


class _Node:
    """A value, list or mapping whose end has not come; or all of the text."""

    def __init__(self, start: yaml.NodeEvent | None) -> None:
        self.anchor: Any = start and start.anchor
        self.size = 1
        self.lines: dict[Any, int] | None = {} if isinstance(start, yaml.MappingStartEvent) else None
        self.is_key = True

    def see(self, event: yaml.NodeEvent, line: int) -> None:
        """Take notice of the next key, value or entry.

        Raises:
            OptionsError: It is a key that was there before.
        """
        if self.lines is not None and self.is_key and isinstance(event, yaml.ScalarEvent):
            first = self.lines.get(event.value)
            if first is not None:
                raise OptionsError(f"line {line}: expected each key once, got {event.value!r} here and in line {first}")
            self.lines[event.value] = line
        self.is_key = not self.is_key


_jsonargparse_load, _jsonargparse_read = get_loader("yaml"), ConfigPath.read_text
set_loader("yaml", _load, (yaml.YAMLError,))
ConfigPath.read_text = _read_text  # type: ignore[assignment,method-assign]
# Where annotations are texts (`from __future__ import annotations`) jsonargparse would drop what `Annotated` adds, and
# help would not show a number's range (lit_vapo/ranges.py).
cast("Any", _postponed_annotations).get_type_hints = partial(get_type_hints, include_extras=True)
# What is text and more (Lightning's `Timer` has a default of an enumeration) is written as its text.
yaml.SafeDumper.add_multi_representer(str, lambda dumper, text: dumper.represent_str(str.__str__(text)))
