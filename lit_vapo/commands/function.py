"""A function as a command: its parameters are the options, its docstring the help."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

from lit_vapo.commands.options import Parser, check_models
from lit_vapo.models.weights import quiet


def call(prog: str, function: Callable[..., None], words: Sequence[str]) -> None:
    """Call a function with what a command line says.

    Args:
        prog: What the command is called, for its messages.
        function: Called with options, which `--config` reads from files. A parameter that is a data module gets the
            same options as that of a stage.
        words: The command line after the command.
    """
    parameters = list(inspect.signature(function).parameters)
    quiet()
    parser = Parser(prog=prog, description=(inspect.getdoc(function) or "").partition("\n\n")[0])
    parser.add_argument("--config", action="config", help="Options from a file.")
    hints = get_type_hints(function)
    data = [name for name in parameters if _is_data(hints.get(name))]
    for name in data:
        # The options of the stages' data, and so the same files.
        parser.add_class_arguments(hints[name], name)
    parser.add_function_arguments(function, skip=set(data), as_group=False)
    parsed = parser.parse_args(list(words))
    check_models(parsed)
    given = parser.instantiate_classes(parsed).as_dict()
    function(**{name: given[name] for name in parameters})


def _is_data(kind: Any) -> bool:
    # Asked without importing Lightning, which takes seconds that a command without data need not wait.
    return isinstance(kind, type) and hasattr(kind, "prepare_data")
