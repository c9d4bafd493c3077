"""Files that grow by lines: whole lines, further columns, and back to where a checkpoint stood."""

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_vapo.callbacks.line_file import LineFile, TableFile, position, rewind
from lit_vapo.callbacks.metrics_file import MetricsFile


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_is_on_the_disk_at_once_and_a_new_column_replaces_the_file_whole(tmp_path):
    table = TableFile(tmp_path / "new" / "metrics.csv")
    table.append({"step": 0, "b": 1.5})
    assert table.path.read_text() == "b,step\n1.5,0\n"
    number = table.path.stat().st_ino
    table.append({"step": 1, "b": 2.5})
    assert table.path.stat().st_ino == number
    table.append({"step": 2, "a": 3})
    assert table.path.stat().st_ino != number
    assert table.path.read_text() == "a,b,step\n,1.5,0\n,2.5,1\n3,,2\n"
    # Another process goes on with the columns that are there.
    TableFile(table.path).append({"step": 3, "b": 4})
    assert read(table.path)[-1] == {"a": "", "b": "4", "step": "3"}
    assert [path.name for path in table.path.parent.iterdir()] == ["metrics.csv"]


def test_what_finds_no_room_is_written_later(tmp_path, monkeypatch):
    file, whole = LineFile(tmp_path / "log"), Path.open
    file.append("one\n")

    class Full:
        """A file of which half of what is written arrives."""

        def __init__(self, inner):
            self.inner = inner

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.inner.close()

        def write(self, text):
            self.inner.write(text[:2])
            self.inner.flush()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda self, *args, **options: Full(whole(self, *args, **options)))
    with pytest.warns(UserWarning, match="log: No space left on device. The run goes on, and writes these lines when"):
        file.append("two\n")
    # Once is enough.
    file.append("three\n")
    with pytest.raises(OSError, match="No space left on device: '.*log'"):
        file.flush()
    monkeypatch.undo()
    assert file.path.read_text() == "one\n"
    file.append("four\n")
    assert file.path.read_text() == "one\ntwo\nthree\nfour\n"


def test_a_file_goes_back_to_where_it_was(tmp_path):
    path = tmp_path / "samples.jsonl"
    nothing = position(path)
    path.write_text('{"a": "line"}\n{"b": 1}\n')
    place = position(path)
    assert place == {"lines": 2, "header": '{"a": "line"}\n'}
    # A crash may leave half of a line.
    path.write_text(path.read_text() + '{"c": 2}\n{"d"')
    rewind(path, place)
    assert path.read_text() == '{"a": "line"}\n{"b": 1}\n'
    before = path.stat().st_mtime_ns
    rewind(path, place)
    assert path.stat().st_mtime_ns == before
    rewind(path, nothing)
    assert not path.exists()
    rewind(path, nothing)


def test_a_table_loses_the_columns_that_came_later(tmp_path):
    table = TableFile(tmp_path / "metrics.csv")
    table.append({"step": 0, "b": 0.1})
    place, text = position(table.path), table.path.read_text()
    table.append({"step": 1, "b": 0.2, "a": "x"})
    rewind(table.path, place)
    assert table.path.read_text() == text


def test_lines_that_are_lost_are_told(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text("1\n2\n3\n")
    place = position(path)
    path.write_text("1\n")
    with pytest.warns(UserWarning, match="expected the 3 lines that the checkpoint counts on, got 1"):
        rewind(path, place)
    assert path.read_text() == "1\n"


def test_the_metrics_of_a_resumed_run_stand_in_the_same_file(tmp_path):
    first = MetricsFile.like(CSVLogger(tmp_path, "logs", prefix="p"))
    first.log_metrics({"loss": torch.tensor(0.5)}, step=3)
    assert first.rows.path == tmp_path / "logs" / "version_0" / "metrics.csv"
    assert read(first.rows.path) == [{"p-loss": "0.5", "step": "3"}]
    again = MetricsFile.like(CSVLogger(tmp_path, "logs"), [first.rows.path])
    again.log_metrics({"p-loss": 0.25}, step=4)
    assert [row["p-loss"] for row in read(first.rows.path)] == ["0.5", "0.25"]
    # Anything else has a file of its own.
    other = MetricsFile.like(CSVLogger(tmp_path, "logs"), [tmp_path / "elsewhere" / "version_0" / "metrics.csv"])
    assert other.rows.path == tmp_path / "logs" / "version_1" / "metrics.csv"
