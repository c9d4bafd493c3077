"""Reading rows from files and from the hub; every row remembers where it came from."""

from __future__ import annotations

import glob
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lit_vapo.data.columns import Columns
from lit_vapo.data.files import BATCH, read_json, read_parquet
from lit_vapo.data.row import Row, UnusableError, attempt

T = TypeVar("T")
# `name` or `owner/name`, perhaps with a configuration and a split.
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w. -]*){0,2}")
FILES = {".jsonl": read_json, ".json": read_json, ".parquet": read_parquet}
# What nobody calls a data set on the hub.
FILE_LIKE = (*FILES, ".csv", ".tsv", ".txt", ".gz", ".zst", ".zip", ".bz2", ".arrow", ".yaml", ".yml")
SKIP = "data.skip_invalid=true leaves such rows out"


def load_rows(sources: str | list[str], key: str, columns: Columns | None = None) -> list[Row]:
    """All rows of one or several sources; those that cannot be read say why.

    Args:
        sources: Paths or globs of `.jsonl`, `.json` and `.parquet` files, or names of data sets on the hub (with a
            configuration and a split after colons, as in `name:config:test` or `name::test`; the split is `train`
            if not given).
        key: The configuration key they were given under, for messages.
        columns: Names of columns.

    Raises:
        ValueError: Nothing there, an unknown file type, or a file that cannot be read.
    """
    return list(iterate_rows(sources, key, columns, lazily=False))


def iterate_rows(
    sources: str | list[str], key: str, columns: Columns | None = None, lazily: bool = True
) -> Iterator[Row]:
    """The rows of `load_rows` one after another.

    Args:
        sources: As in `load_rows`.
        key: The configuration key they were given under, for messages.
        columns: Names of columns.
        lazily: Hold no more than a part of a file; data sets on the hub are then not downloaded but streamed.

    Raises:
        ValueError: As in `load_rows`.
    """
    columns = columns or Columns()
    empty = True
    for source in [sources] if isinstance(sources, str) else sources:
        for row in columns.of_one_kind(_read(source, key, lazily), all_at_once=not lazily):
            empty = False
            yield row
    if empty:
        raise ValueError(f"{key}: expected at least one row, got none in {sources}")


def each_row(rows: Sequence[Row], read: Callable[[Row], T], key: str, skip_invalid: bool) -> list[T]:
    """What `read` makes of every row; those of no use are left out, with a warning for each kind of them.

    Args:
        rows: Rows of one or several sources.
        read: Reads one row; raises ValueError where it is invalid, and UnusableError where it is of no use.
        key: The configuration key of the sources, for messages.
        skip_invalid: Leave invalid rows out, too.

    Raises:
        ValueError: A row is invalid, or more than half of them are of no use, and `skip_invalid` is off; or no valid
            row is left.
    """
    kept: list[T] = []
    left_out = LeftOut(key, skip_invalid)
    for row in rows:
        try:
            kept.append(attempt(read, row))
        except ValueError as error:
            left_out.add(error)
    left_out.refuse(len(rows))
    left_out.warn(len(rows))
    return kept


class LeftOut:
    """Rows that are left out, counted by kind.

    Args:
        key: The configuration key of the sources, for messages.
        skip_invalid: Leave invalid rows out, and not only those of no use.
    """

    def __init__(self, key: str, skip_invalid: bool) -> None:
        self.key = key
        self.skip_invalid = skip_invalid
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, error: ValueError) -> None:
        """Count a row.

        Raises:
            ValueError: It is invalid, and those are not left out.
        """
        if not isinstance(error, UnusableError) and not self.skip_invalid:
            raise ValueError(f"{error}; {SKIP}") from error
        kind = error.kind if isinstance(error, UnusableError) else "invalid"
        self.counts[kind] += 1
        self.first.setdefault(kind, str(error))

    def refuse(self, total: int) -> None:
        """Refuse rows of which too many are left out: all, or, unless invalid rows are meant to be, more than half.

        Args:
            total: How many rows there were.

        Raises:
            ValueError: Too many are.
        """
        number = self.counts.total()
        if number and number == total:
            first = next(iter(self.first.values()))
            raise ValueError(f"{self.key}: expected at least one valid row, got none of {total}; the first: {first}")
        if 2 * number > total and not self.skip_invalid:
            kinds = ", ".join(f"{count} ({kind})" for kind, count in self.counts.items())
            raise ValueError(
                f"{self.key}: expected more than half of {total} rows to be of use, got {kinds} that are not; the "
                f"first: {next(iter(self.first.values()))}; {SKIP}"
            )

    def warn(self, total: int) -> None:
        """Say what was left out of `total` rows, a line for each kind."""
        for kind, count in self.counts.items():
            message = f"{self.key}: left out {count} of {total} rows ({kind}); the first: {self.first[kind]}"
            warnings.warn(message, stacklevel=3)


def _read(source: str, key: str, lazily: bool) -> Iterator[Row]:
    path, paths = Path(source).expanduser(), local_files([source])
    if not paths:
        if path.suffix in FILE_LIKE or not HUB_NAME.fullmatch(source):
            raise ValueError(f"{key}: expected a file, got {source!r}, which does not exist")
        yield from _read_hub(source, key, lazily)
    for path in paths:
        if path.suffix not in FILES or not path.is_file():
            raise ValueError(f"{key}: expected a .jsonl, .json or .parquet file, got {str(path)!r}")
        yield from FILES[path.suffix](path)


def local_files(sources: str | Iterable[str]) -> list[Path]:
    """The files that sources mean; a data set of the hub means none."""
    found = []
    for source in [sources] if isinstance(sources, str) else sources:
        path = Path(source).expanduser()
        # A file's own name may look like a pattern.
        found += [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(str(path)))]
    return found


def _read_hub(source: str, key: str, lazily: bool) -> Iterator[Row]:
    name, config, split = [*source.split(":"), "", ""][:3]
    split = split or "train"
    place = f"{source} ({split})"
    # Here, since it takes half a second to import, and files do without.
    import datasets

    try:
        table = datasets.load_dataset(name, config or None, split=split, streaming=lazily)
    except Exception as error:  # the hub's client has many, and few of them name the source
        raise ValueError(f"{key}: expected a file or a data set on the hub, got {source!r} ({error})") from error
    rows: Iterable[Any] = _one_by_one(table) if lazily else table
    yield from (Row(dict(values), f"{place}, row {i}") for i, values in enumerate(rows, 1))


def _one_by_one(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a streamed table.

    Read in batches, since iterating over rows would deal them out to worker processes once more than `PairStream`.
    """
    for batch in table.iter(BATCH):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))
