"""`lit-vapo data show`: what training makes of a file, token by token."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from lit_vapo.commands.options import Parser
from lit_vapo.data.columns import Columns
from lit_vapo.data.readers import load_encoder
from lit_vapo.data.show import Marks, Summary, Viewer, show
from lit_vapo.data.sources import iterate_rows
from lit_vapo.models.weights import quiet


def show_file(
    file: str,
    tokenizer: str,
    rows: int = 3,
    max_length: int = 1024,
    max_prompt_length: int = 512,
    columns: dict[str, str | None] | None = None,
    append_eos: bool = True,
    templated: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    stop_token_ids: list[int] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Show rows of preferences or prompts token by token, and count what is wrong with the whole file.

    Args:
        file: A file, a glob or a hub name, as in `data.preferences`.
        tokenizer: Folder or hub name of the tokenizer.
        rows: How many rows to show.
        max_length: As `data.max_length`.
        max_prompt_length: As `data.max_prompt_length`.
        columns: As `data.columns`.
        append_eos: As `data.append_eos`.
        templated: As `data.templated`.
        chat_template_kwargs: As `data.chat_template_kwargs`.
        stop_token_ids: As `data.stop_token_ids`.
        trust_remote_code: As `data.trust_remote_code`.

    Raises:
        ValueError: The file or the tokenizer cannot be read.
    """
    names = Columns(columns)
    encoder = load_encoder(tokenizer, append_eos, templated, chat_template_kwargs, stop_token_ids, trust_remote_code)
    width = shutil.get_terminal_size((100, 24)).columns
    viewer = Viewer(encoder, max_length, Marks.of(sys.stdout.encoding or "ascii"), width)
    summary = Summary(encoder, max_length, max_prompt_length, names.implicit)
    # Colours on a terminal, and plain text elsewhere; rich would break lines of a file at 80.
    console = Console(soft_wrap=True, highlight=False) if sys.stdout.isatty() else None
    for line in show(iterate_rows(file, "FILE", names), summary, viewer, rows):
        if console:
            console.print(line)
        else:
            print(line.plain.rstrip())


def main(words: Sequence[str]) -> None:
    """Parse a command line without `lit-vapo data show`, and run."""
    quiet()
    # What a template or a text is warned of, it is warned of once.
    warnings.filterwarnings("once", module="lit_vapo")
    parser = Parser(prog="lit-vapo data show", description=(show_file.__doc__ or "").partition("\n\n")[0])
    parser.add_argument("file", type=str, help="A file, a glob or a hub name, as in data.preferences.")
    parser.add_function_arguments(show_file, skip={"file"}, as_group=False)
    show_file(**parser.parse_args(list(words)).as_dict())
