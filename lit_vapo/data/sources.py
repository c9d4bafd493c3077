"""Reading rows from files and from the hub; every row remembers where it came from."""

from __future__ import annotations

import glob
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets

T = TypeVar("T")
BATCH = 1000
# What stands between the objects of an array.
BETWEEN = re.compile(r"[\s,]*")


class Row(NamedTuple):
    """One row of a data set.

    Attributes:
        values: Column name to value.
        place: Where it stands, for messages: `file, line 7`.
    """

    values: Mapping[str, Any]
    place: str


def load_rows(sources: str | list[str], key: str) -> list[Row]:
    """All rows of one or several sources.

    Args:
        sources: Paths or globs of `.jsonl`, `.json` and `.parquet` files, or names of data sets on the hub (with a
            configuration and a split after colons, as in `name:config:test` or `name::test`; the split is `train`
            if not given).
        key: The configuration key they were given under, for messages.

    Raises:
        ValueError: Nothing there, an unknown file type, or a malformed file or line.
    """
    return list(iterate_rows(sources, key, lazily=False))


def iterate_rows(sources: str | list[str], key: str, lazily: bool = True) -> Iterator[Row]:
    """The rows of `load_rows` one after another.

    Args:
        sources: As in `load_rows`.
        key: The configuration key they were given under, for messages.
        lazily: Hold no more than a part of a file; data sets on the hub are then not downloaded but streamed.

    Raises:
        ValueError: As in `load_rows`.
    """
    empty = True
    for source in [sources] if isinstance(sources, str) else sources:
        prompted = None
        for row in _read(source, key, lazily):
            prompted = "prompt" in row.values if prompted is None else prompted
            # A row that merely forgot its prompt would pass for a dialogue with an implicit one.
            if ("prompt" in row.values) != prompted:
                raise ValueError(f"{row.place}: expected column 'prompt' in all rows of a source or in none")
            empty = False
            yield row
    if empty:
        raise ValueError(f"{key}: expected at least one row, got none in {sources}")


def each_row(rows: Sequence[Row], read: Callable[[Row], T], key: str, skip_invalid: bool) -> list[T]:
    """What `read` makes of every row.

    Args:
        rows: Rows of one or several sources.
        read: Reads one row; raises ValueError where it is invalid.
        key: The configuration key of the sources, for messages.
        skip_invalid: Leave invalid rows out and warn once of their number.

    Raises:
        ValueError: A row is invalid and `skip_invalid` is off, or no valid row is left.
    """
    kept: list[T] = []
    complaints: list[str] = []
    for row in rows:
        try:
            kept.append(read(row))
        except ValueError as error:
            if not skip_invalid:
                raise
            complaints.append(str(error))
    if complaints and not kept:
        raise ValueError(f"{key}: expected at least one valid row, got none; the first: {complaints[0]}")
    if complaints:
        message = f"{key}: left out {len(complaints)} of {len(rows)} rows; the first: {complaints[0]}"
        warnings.warn(message, stacklevel=2)
    return kept


def _read(source: str, key: str, lazily: bool) -> Iterator[Row]:
    paths = [Path(p) for p in sorted(glob.glob(str(Path(source).expanduser())))]
    if not paths:
        if Path(source).suffix in (".jsonl", ".json", ".parquet") or source.startswith((".", "/", "~")):
            raise ValueError(f"{key}: expected a file, got {source!r}, which does not exist")
        yield from _read_hub(source, lazily)
    for path in paths:
        if path.suffix == ".parquet":
            yield from _read_parquet(path, lazily)
        elif path.suffix in (".jsonl", ".json"):
            yield from _read_array(path) if _is_array(path) else _read_jsonl(path)
        else:
            raise ValueError(f"{key}: expected a .jsonl, .json or .parquet file, got {str(path)!r}")


def _read_jsonl(path: Path) -> Iterator[Row]:
    """One JSON object a line; read here rather than by `datasets` so that a mistake has a line number."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                values = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{place}: expected a JSON object, got malformed JSON ({error})") from error
            yield _object(values, place)


def _is_array(path: Path) -> bool:
    """Whether a `.json` file is one array, as LLMBar's are; lines of objects begin otherwise."""
    if path.suffix != ".json":
        return False
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _read_array(path: Path) -> Iterator[Row]:
    """The objects of an array, each with the line that it begins on; the file is read as a whole."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a JSON array, got malformed text ({error})") from error
    decoder = json.JSONDecoder()
    end, line = text.index("[") + 1, 1
    counted = 0
    while True:
        start = BETWEEN.match(text, end).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, start), start
        if text[start : start + 1] == "]":
            return
        try:
            values, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {line}: expected a JSON object, got malformed JSON ({error})") from error
        yield _object(values, f"{path}, line {line}")


def _object(values: Any, place: str) -> Row:
    if not isinstance(values, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(values).__name__}")
    return Row(values, place)


def _read_parquet(path: Path, lazily: bool) -> Iterator[Row]:
    try:
        if lazily:
            table = datasets.load_dataset(
                "parquet", data_files=str(path), split="train", streaming=True, batch_size=BATCH
            )
            yield from _one_by_one(table, str(path))
            return
        table = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    except Exception as error:  # pyarrow and datasets have many, and none of them names the file
        raise ValueError(f"{path}: expected a Parquet file, got one that cannot be read ({error})") from error
    yield from (Row(dict(values), f"{path}, row {i}") for i, values in enumerate(table, 1))


def _read_hub(source: str, lazily: bool) -> Iterator[Row]:
    name, config, split = [*source.split(":"), "", ""][:3]
    split = split or "train"
    place = f"{source} ({split})"
    try:
        table = datasets.load_dataset(name, config or None, split=split, streaming=lazily)
    except Exception as error:  # the hub's client has many, and few of them name the source
        raise ValueError(f"{source}: expected a file or a data set on the hub, got none ({error})") from error
    if lazily:
        yield from _one_by_one(table, place)
    else:
        yield from (Row(dict(values), f"{place}, row {i}") for i, values in enumerate(table, 1))


def _one_by_one(table: Any, place: str) -> Iterator[Row]:
    """The rows of a streamed table.

    Read in batches, since iterating over rows would deal them out to worker processes once more than `PairStream`.
    """
    number = 0
    for batch in table.iter(BATCH):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield Row(dict(zip(batch, values, strict=True)), f"{place}, row {number}")
