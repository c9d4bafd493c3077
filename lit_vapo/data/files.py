"""Rows of files. What is wrong with one row is handed on with it; what is wrong with a file is an error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from lit_vapo.data.row import Row

BATCH = 1000
# What stands between the objects of an array.
BETWEEN = re.compile(r"[\s,]*")
# Bytes that are no UTF-8, as Python's `surrogateescape` writes them down.
UNDECODED = re.compile("[\udc80-\udcff]")
OBJECT = "expected a JSON object"


class JsonReader:
    """Reads JSON, and keeps what it has no place for: a key given twice, a number that is none, endless digits.

    Python's own reader takes the last of two keys and lets NaN through.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._integer
        )

    def read(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at `start`, and where it ends; `problems` are then those of this value.

        Raises:
            json.JSONDecodeError: There is none.
            RecursionError: It is nested too deeply.
        """
        self.problems.clear()
        return self._decoder.raw_decode(text, start)

    def row(self, value: Any, place: str) -> Row:
        """The row that the value last read makes."""
        if self.problems:
            return Row({}, place, f"{OBJECT}, got {self.problems[0]}")
        if not isinstance(value, dict):
            return Row({}, place, f"{OBJECT}, got {type(value).__name__}")
        return Row(value, place)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self.problems.append(f"the key {ascii(twice)[:60]} twice")
        return values

    def _constant(self, name: str) -> None:
        self.problems.append(f"{name}, which is no JSON")

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:
            self.problems.append(f"a number of {len(digits)} digits")
            return 0


def read_json(path: Path) -> Iterator[Row]:
    """The objects of a file: one a line, or one array.

    Raises:
        ValueError: The file cannot be read, is no UTF-8, or an array breaks off.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
        # UTF-16 has a zero beside every letter of JSON.
        if b"\x00" in start[:4]:
            raise ValueError(f"{path}: expected text in UTF-8, got another encoding or a binary file")
        array = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        yield from _array(path) if array else _lines(path)
    except OSError as error:
        raise ValueError(f"{path}: expected a file that can be read, got: {error}") from error


def _lines(path: Path) -> Iterator[Row]:
    """One object a line; read here rather than by `datasets` so that a mistake has a line number."""
    reader = JsonReader()
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            if not text:
                continue
            place = f"{path}, line {number}"
            if UNDECODED.search(text):
                yield Row({}, place, f"{OBJECT}, got malformed text, which is no UTF-8")
                continue
            try:
                value, end = reader.read(text, 0)
                if end < len(text):
                    raise json.JSONDecodeError("more after its end", text, end)
            except json.JSONDecodeError as error:
                problem = f"malformed JSON ({error.msg}, at character {error.pos + 1})"
                yield Row({}, place, f"{OBJECT}, got {problem}")
            except RecursionError:
                yield Row({}, place, f"{OBJECT}, got one nested too deeply")
            else:
                yield reader.row(value, place)


def _array(path: Path) -> Iterator[Row]:
    """The objects of an array, each with the line that it begins on; the file is read as a whole."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a JSON array, got malformed text, which is no UTF-8 ({error})") from error
    reader = JsonReader()
    end, line = text.index("[") + 1, 1
    counted = 0
    while True:
        start = BETWEEN.match(text, end).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, start), start
        if text[start : start + 1] == "]":
            break
        try:
            value, end = reader.read(text, start)
        except (json.JSONDecodeError, RecursionError) as error:
            # Where the next object begins cannot be told, so this is the file's fault and not the row's.
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise ValueError(f"{path}, line {line}: {OBJECT}, got malformed JSON ({reason})") from error
        yield reader.row(value, f"{path}, line {line}")
    rest = text[start + 1 :]
    if rest.strip():
        line += rest[: len(rest) - len(rest.lstrip())].count("\n")
        raise ValueError(f"{path}, line {line}: expected the end of the file after a JSON array, got more")


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file, a part of it at a time.

    Raises:
        ValueError: It is none, is damaged, or has two columns of one name.
    """
    expected = f"{path}: expected a Parquet file"
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{expected} with columns of different names, got {twice} more than once")
            # No threads: they do not survive in processes that prepare batches.
            for batch in file.iter_batches(BATCH, use_threads=False):
                for row in _table(batch, path, number):
                    number += 1
                    yield row
    except (OSError, pyarrow.ArrowException) as error:
        got = f"got one that cannot be read ({_line(error)})"
        raise ValueError(f"{expected}, {got}" + (f", after row {number}" if number else "")) from error


def _table(batch: pyarrow.RecordBatch, path: Path, before: int) -> Iterator[Row]:
    encoded = "arrow.json" in str(batch.schema)
    try:
        rows = batch.to_pylist()
    except Exception:  # such as text that is no UTF-8: whose it is, shows one by one
        rows = [None] * batch.num_rows
    for index, values in enumerate(rows):
        place = f"{path}, row {before + index + 1}"
        try:
            found = batch.slice(index, 1).to_pylist()[0] if values is None else values
            if encoded:
                found = {field.name: _decoded(found[field.name], field.type) for field in batch.schema}
        except Exception as error:
            yield Row({}, place, f"expected a row of Parquet that can be read, got: {_line(error)}")
        else:
            yield Row(found, place)


def _decoded(value: Any, kind: pyarrow.DataType) -> Any:
    """A value with its parts that are stored as JSON read (`datasets` stores columns of mixed types so)."""
    if value is None:
        return None
    if getattr(kind, "extension_name", None) == "arrow.json":
        return json.loads(value)
    if pyarrow.types.is_struct(kind):
        return {field.name: _decoded(value[field.name], field.type) for field in kind}
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return [_decoded(item, kind.value_type) for item in value]
    return value


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
