"""`lit-vapo score`: rewards of responses, line by line, from a file or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any, NamedTuple

from pydantic import ValidationError

from lit_vapo.commands.options import Parser
from lit_vapo.commands.sources import chosen_source, device_of, opinions, ready, row_responses, warn_of_units
from lit_vapo.models.settings import explain
from lit_vapo.models.weights import quiet
from lit_vapo.rewards import RewardSource
from lit_vapo.rewards.protocol import Row
from lit_vapo.rollout import Encoders

STANDARD = "-"


class Line(NamedTuple):
    """A response to score.

    Attributes:
        given: What its line says, which is printed again.
        row: What of it is scored.
    """

    given: dict[str, Any]
    row: Row


def score(ensemble: str, file: str = STANDARD, batch_size: int = 16, trust: list[str] | None = None) -> None:
    """Score responses: each line of JSON is printed again with `reward`, `sigma` and `members`.

    A line has `prompt` (a text, or messages) and `response`; further keys are kept. `reward` is the mean of the members
    and `sigma` their standard deviation, in standard deviations of the reference's rewards where the ensemble is
    calibrated. They are `null` where the source says nothing of a response.

    Args:
        ensemble: Folder of an ensemble or of public reward models.
        file: A file of JSON lines, all of which are read before the first is scored; `-` for standard input, of which
            each `batch_size` lines are scored as they come.
        batch_size: Responses that are scored together.
        trust: Code outside of lit_vapo that the folder may run: classes by their Python name, models that bring code by
            folder or hub name.

    Raises:
        ValueError: A line is no response, or there is no such source.
    """
    if batch_size < 1:
        raise ValueError(f"--batch_size: expected at least 1, got {batch_size}")
    name = "standard input" if file == STANDARD else file
    with nullcontext(sys.stdin) if file == STANDARD else open(file, encoding="utf-8") as stream:
        lines: Iterator[Line] = read_lines(stream, name)
        if file != STANDARD:
            lines = iter(list(lines))
        source = ready(chosen_source(None, ensemble, trust), device_of())
        warn_of_units(source)
        encoders = Encoders()
        while batch := list(islice(lines, batch_size)):
            for record in scored(source, batch, encoders):
                print(json.dumps(record, ensure_ascii=False), flush=True)


def read_lines(stream: Iterable[str], name: str) -> Iterator[Line]:
    """The responses of a file; empty lines are passed over.

    Args:
        stream: Its lines.
        name: What messages call it.

    Raises:
        ValueError: A line is no response; the message says which and what is expected.
    """
    for number, text in enumerate(stream, 1):
        if not text.strip():
            continue
        place = f"{name}:{number}"
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: expected a line of JSON with prompt and response, got {error.msg}") from None
        if not isinstance(given, dict):
            raise ValueError(f"{place}: expected an object with prompt and response, got {type(given).__name__}")
        try:
            row = Row.model_validate({key: given[key] for key in Row.model_fields if key in given})
        except ValidationError as error:
            raise ValueError(f"{place}: {explain(error)}") from None
        yield Line(given, row)


def scored(source: RewardSource, batch: Sequence[Line], encoders: Encoders) -> list[dict[str, Any]]:
    """What is printed of some lines.

    Raises:
        ValueError: The source wants a column that a line has not.
    """
    for line in batch:
        if absent := [name for name in source.columns if name not in line.given]:
            raise ValueError(f"expected {absent[0]!r} in each line, which this source reads; got {sorted(line.given)}")
    columns = {name: [line.given[name] for line in batch] for name in source.columns}
    found = opinions(source, row_responses([line.row for line in batch], encoders, columns))
    return [line.given | told for line, told in zip(batch, found, strict=True)]


def main(words: Sequence[str]) -> None:
    """Parse a command line without `lit-vapo score`, and run."""
    quiet()
    parser = Parser(prog="lit-vapo score", description=(score.__doc__ or "").partition("\n\n")[0])
    parser.add_argument("ensemble", type=str, help="Folder of an ensemble or of public reward models.")
    parser.add_argument("file", type=str, nargs="?", default=STANDARD, help="JSON lines; - for standard input.")
    parser.add_function_arguments(score, skip={"ensemble", "file"}, as_group=False)
    score(**parser.parse_args(list(words)).as_dict())
