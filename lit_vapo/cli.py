"""The command line: one table of commands, from which help, dispatch and errors come.

Nothing that a command needs is imported before it runs, so that `lit-vapo --help` answers at once.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lit_vapo import __version__
from lit_vapo.commands.completion import print_script
from lit_vapo.commands.notices import silence
from lit_vapo.commands.short_help import short_help
from lit_vapo.console import lasting, reported


class Command(NamedTuple):
    """A line of the table.

    Attributes:
        name: What is typed after `lit-vapo`.
        summary: What it does.
        target: What runs it, as `module:function`. A function of `words` reads the command line by itself; the
            options of any other are its parameters, as its docstring explains them.
        parts: Words that it takes next, for a stage.
        extra: What to install besides the package, as `pip install 'lit-vapo[extra]'`.
    """

    name: str
    summary: str
    target: str
    parts: tuple[str, ...] = ()
    extra: str = ""


TRAIN = ("fit", "validate", "test")
TABLE = {
    "stages": (
        Command("sft", "make a base policy by supervised fine-tuning", "lit_vapo.commands.stages:sft", TRAIN),
        Command("reward", "train an ensemble of reward models", "lit_vapo.commands.stages:reward", TRAIN),
        Command("ppo", "align the policy", "lit_vapo.commands.stages:ppo", (*TRAIN, "predict")),
        Command("plan", "say whether a stage will fit a GPU, and how long it takes", "lit_vapo.commands.plan:plan"),
        Command("export", "turn a checkpoint into a folder that others load", "lit_vapo.commands.export:export"),
    ),
    "for what you made": (
        Command("report", "one page about a run, or about two", "lit_vapo.commands.report:main"),
        Command("chat", "talk to a policy, beside its reference and an ensemble", "lit_vapo.commands.chat:main"),
        Command("compare", "two policies on the same prompts, and which is better", "lit_vapo.commands.compare:main"),
        Command("score", "score responses, line by line", "lit_vapo.commands.score:main"),
    ),
    "for rewards that are there": (
        Command("reward join", "make one ensemble of single members", "lit_vapo.commands.ensembles:join"),
        Command("reward calibrate", "centre and scale members anew", "lit_vapo.commands.ensembles:calibrate"),
        Command("reward disagreement", "draw members' scores and σ", "lit_vapo.commands.ensembles:disagreement"),
        Command("reward evaluate", "test any rewards on preference pairs", "lit_vapo.commands.evaluate:evaluate"),
        Command("reward serve", "score for others over HTTP", "lit_vapo.commands.serve:serve"),
    ),
    "for data": (
        Command("data show", "show what training makes of a file, and its faults", "lit_vapo.commands.data_show:main"),
    ),
    "for this machine": (
        Command("completion", "complete commands and options in bash or zsh", "lit_vapo.cli:completion"),
        Command("env", "say what is installed, for a report of a fault", "lit_vapo.commands.environment:environment"),
    ),
    "for those who come from elsewhere": (
        Command("convert trl", "a configuration of TRL as one of ours", "lit_vapo.commands.convert:main"),
    ),
    "for repeated runs": (
        Command("study run", "run what is missing, and report", "lit_vapo.study.command:run", extra="study"),
        Command("study report", "tables, pictures and verdicts", "lit_vapo.study.command:report", extra="study"),
    ),
}
COMMANDS = {command.name: command for commands in TABLE.values() for command in commands}
STAGES = tuple(command.name for command in COMMANDS.values() if command.parts)
HELP, HELP_ALL = ("-h", "--help"), ("--help_all", "--help-all")


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        args: Command line without the program's name. If `None`, it is that of the process, which then ends as a
            command does: an error of the user is one message and exit code 2. Who calls this from Python gets the
            exception.

    Raises:
        ValueError: There is no such command, or it refuses what it was given.
    """
    if args is None:
        sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)
        with reported():
            _run(sys.argv[1:])
    else:
        _run(list(args))


def _run(words: list[str]) -> None:
    # Your own estimators, objectives and judges are found from where you stand, as with `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if not words or words[0] in HELP:
        print(usage())
    elif words[0] == "--version":
        print(f"lit-vapo {__version__}")
    elif len(words) > 1 and " ".join(words[:2]) in COMMANDS:
        _call(COMMANDS[" ".join(words[:2])], words[2:])
    elif len(words) > 1 and words[1] in HELP and following(words[0]):
        print(usage(words[0]))
    elif words[0] in COMMANDS and _fits(COMMANDS[words[0]], words[1:]):
        command, rest = COMMANDS[words[0]], words[1:]
        if rest[:1] and rest[0] in command.parts and not set(HELP).isdisjoint(rest):
            print(short_help(command.name, rest[0]))
        else:
            _call(command, rest)
    else:
        _refuse(words)


def _fits(command: Command, rest: list[str]) -> bool:
    """Whether a command takes the words after it; a stage says itself that it cannot predict."""
    return not command.parts or bool(rest and (rest[0].startswith("-") or rest[0] in (*command.parts, "predict")))


def following(first: str) -> tuple[str, ...]:
    """The words that may follow a first one."""
    parts = COMMANDS[first].parts if first in COMMANDS else ()
    return (*parts, *(name.split()[1] for name in COMMANDS if name.startswith(f"{first} ")))


def _refuse(words: list[str]) -> None:
    """Name what there is in place of what was given.

    Raises:
        ValueError: Always.
    """
    allowed, given = [f"{words[0]} {word}" for word in following(words[0])], " ".join(words[:2])
    if allowed:
        raise ValueError(f"expected {_listed(allowed)}, got {given!r}\nAll of them: lit-vapo {words[0]} --help")
    firsts = dict.fromkeys(name.split()[0] for name in COMMANDS)
    raise ValueError(f"expected a stage or command: {_listed(firsts)}, got {words[0]!r}\nAll of them: lit-vapo --help")


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def usage(first: str = "") -> str:
    """What there is.

    Args:
        first: Only what begins with this word.
    """
    shown = {name: c for name, c in COMMANDS.items() if not first or name.split()[0] == first}
    width = max(map(len, shown))
    lines = [f"usage: lit-vapo {first or 'STAGE'} COMMAND [options]"]
    for title, commands in TABLE.items():
        here = [command for command in commands if command.name in shown]
        if here:
            lines += ["", f"{title}:"]
        for command in here:
            parts = f" ({', '.join(command.parts)})" if command.parts else ""
            lines.append(f"  {command.name:{width}}  {command.summary}{parts}")
    example = next(c for c in shown.values())
    words = " ".join((example.name, *example.parts[:1]))
    return "\n".join([*lines, "", f"options of a command: lit-vapo {words} --help"])


def _call(command: Command, words: list[str]) -> None:
    """Import what runs a command, and run it.

    Raises:
        ValueError: A package is missing that comes with an extra.
    """
    silence()
    module, _, name = command.target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if not command.extra or (error.name or "").partition(".")[0] == __package__:
            raise
        need = f"lit-vapo {command.name} needs {error.name}: pip install 'lit-vapo[{command.extra}]'"
        raise ValueError(need) from error
    words = ["--help" if word in HELP_ALL else word for word in words]
    if list(inspect.signature(function).parameters) == ["words"]:
        function(words)
        return
    from lit_vapo.commands.function import call

    call(f"lit-vapo {command.name}", function, words)


def completion(words: Sequence[str]) -> None:
    """Print what a shell needs to complete commands and options."""
    firsts = {name.split()[0]: following(name.split()[0]) for name in COMMANDS}
    print_script(words, firsts)
