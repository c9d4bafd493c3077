"""Markdown in which names and texts of others are shown, and never act."""

from __future__ import annotations

import re
from typing import Any


def line(text: str) -> str:
    """One line of our own words, with names of others among them: bold and code stay, HTML and links do not."""
    return " ".join(text.split("\n")).replace("<", "&lt;").replace("[", "\\[")


def cell(value: Any) -> str:
    r"""A cell of a table, as plain text; it neither ends nor splits its row.

    >>> print(cell("a | b"))
    a \| b
    """
    return re.sub(r"([\\`|<\[\]*])", r"\\\1", " ".join(str(value).split()))


def code(text: str) -> str:
    """Code within a line, in more backticks than it holds itself.

    >>> print(code("a`b"))
    `` a`b ``
    """
    shown = " ".join(text.split())
    marks = "`" * (_longest(shown) + 1)
    return f"{marks} {shown} {marks}" if "`" in shown else f"{marks}{shown}{marks}"


def block(text: str, language: str) -> str:
    """A block of code, fenced by more backticks than it holds itself."""
    fence = "`" * max(3, _longest(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest(text: str) -> int:
    """The longest run of backticks."""
    return max((len(run) for run in re.findall("`+", text)), default=0)
