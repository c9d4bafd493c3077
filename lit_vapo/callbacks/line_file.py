"""Files of a run that grow by lines: whole lines only, also on a full disk, and back to where a checkpoint stood."""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lit_vapo.folders import write_whole


class LineFile:
    """A text file that lines are added to.

    What cannot be written now, since the disk is full, is kept, and written with the next lines.

    Args:
        path: The file; its folder is made if need be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[Any] = []
        self._warned = False

    def append(self, lines: Any) -> None:
        """Add whole lines; a disk that takes none is told once."""
        self.waiting.append(lines)
        try:
            self.flush()
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{self.path}: {error.strerror}. The run goes on, and writes these lines when it can.", stacklevel=3
                )

    def flush(self) -> None:
        """Write what waits.

        Raises:
            OSError: It cannot be written; the file is as it was.
        """
        if self.waiting:
            self.write()
            self.waiting = []

    def write(self) -> None:
        """Write what waits, or nothing of it."""
        self._add("".join(self.waiting))

    def _add(self, text: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(text)
        except OSError as error:
            if self.path.exists():
                # Half of a line would be joined with the next one.
                os.truncate(self.path, before)
            raise OSError(error.errno, error.strerror, str(self.path)) from error


class TableFile(LineFile):
    """A table as CSV that rows are added to. Where a row has a new column, a table with it replaces the file whole."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._columns: list[str] | None = None

    def write(self) -> None:
        """Write the rows that wait, or none of them."""
        if self._columns is None:
            self._columns = _read_table(self.path)[0]
        columns = sorted({*self._columns, *(name for row in self.waiting for name in row)})
        if columns == self._columns:
            self._add(as_csv(columns, self.waiting, header=False))
            return
        _, rows = _read_table(self.path)
        write_whole(self.path, as_csv(columns, [*rows, *self.waiting]))
        self._columns = columns


def position(path: Path) -> dict[str, Any]:
    """How far a file has come: the number of its whole lines, and the first one."""
    if not path.is_file():
        return {"lines": 0, "header": ""}
    with path.open("rb") as file:
        header = file.readline().decode()
        lines = int(header.endswith("\n")) + sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        # On the disk, before a checkpoint counts on it.
        os.fsync(file.fileno())
    return {"lines": lines, "header": header}


def rewind(path: Path, place: Mapping[str, Any]) -> None:
    """Take a file back to where it was, so that a resumed run adds each line once.

    A table that has got more columns since loses them again.

    Args:
        path: The file.
        place: What `position` said of it.
    """
    now, count = position(path), place["lines"]
    if now["lines"] < count:
        warnings.warn(
            f"{path}: expected the {count} lines that the checkpoint counts on, got {now['lines']}; the others were "
            "lost after it was written",
            stacklevel=2,
        )
        # The next line must not be joined with half of one.
        write_whole(path, "".join(_lines(path, now["lines"])))
    elif count == 0:
        path.unlink(missing_ok=True)
    elif now["header"] == place["header"]:
        text = "".join(_lines(path, count))
        if len(text.encode()) < path.stat().st_size:
            write_whole(path, text)
    elif path.suffix == ".csv":
        columns = next(csv.reader([place["header"]]))
        write_whole(path, as_csv(columns, _read_table(path)[1][: count - 1]))


def as_csv(columns: list[str], rows: list[dict[str, Any]], header: bool = True) -> str:
    """Rows as CSV; what a row does not have is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _lines(path: Path, count: int) -> list[str]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(islice(file, count))


def _read_table(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    if not path.is_file():
        return [], []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or ()), list(reader)
