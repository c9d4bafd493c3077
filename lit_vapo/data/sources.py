"""Reading rows from files and from the hub; every row remembers where it came from."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets


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
    rows: list[Row] = []
    for source in [sources] if isinstance(sources, str) else sources:
        rows.extend(_read(source, key))
    if not rows:
        raise ValueError(f"{key}: expected at least one row, got none in {sources}")
    return rows


def _read(source: str, key: str) -> Iterator[Row]:
    paths = [Path(p) for p in sorted(glob.glob(str(Path(source).expanduser())))]
    if not paths:
        if Path(source).suffix in (".jsonl", ".json", ".parquet") or source.startswith((".", "/", "~")):
            raise ValueError(f"{key}: expected a file, got {source!r}, which does not exist")
        yield from _read_hub(source)
    for path in paths:
        if path.suffix == ".parquet":
            yield from _read_parquet(path)
        elif path.suffix in (".jsonl", ".json"):
            yield from _read_jsonl(path)
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
            if not isinstance(values, dict):
                raise ValueError(f"{place}: expected a JSON object, got {type(values).__name__}")
            yield Row(values, place)


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        table = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    except Exception as error:  # pyarrow and datasets have many, and none of them names the file
        raise ValueError(f"{path}: expected a Parquet file, got one that cannot be read ({error})") from error
    yield from (Row(dict(values), f"{path}, row {i}") for i, values in enumerate(table, 1))


def _read_hub(source: str) -> Iterator[Row]:
    name, config, split = [*source.split(":"), "", ""][:3]
    split = split or "train"
    table = datasets.load_dataset(name, config or None, split=split)
    yield from (Row(dict(values), f"{source} ({split}), row {i}") for i, values in enumerate(table, 1))
