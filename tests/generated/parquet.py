"""Parquet files: columns of several types, and files with a part changed or missing."""

import io
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import reject
from hypothesis import strategies as st

from tests.generated.harm import SHARE
from tests.generated.outcome import Kind
from tests.generated.pairs import DIALOGUES, MESSAGES, SHAPES, Written, written
from tests.generated.reading import check_rows

TEXT_TYPES = (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()))
COMPRESSION = st.sampled_from(("none", "snappy", "zstd", "gzip"))


class Table(NamedTuple):
    """Rows as columns, what is done to the file's bytes, and the options it is read with."""

    rows: list[Written]
    columns: pa.Table
    compression: str
    harm: tuple[str, float]
    options: dict[str, Any]
    streams: bool


@st.composite
def tables(draw):
    shape = draw(st.sampled_from([SHAPES["texts"], *DIALOGUES, *MESSAGES]))
    rows = draw(st.lists(written(shape, lines=False), min_size=1, max_size=3))
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    try:
        columns = pa.Table.from_pylist([dict.fromkeys(names) | row.values for row in rows])
        pq.write_table(columns, io.BytesIO())
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        reject()
    # A column has one type: what is no number may have become one.
    if any(type(row.values.get(name)) is bool for row in rows for name in ("margin", "weight", "agreement")):
        reject()
    for index, name in enumerate(columns.column_names):
        if columns.schema.field(name).type == pa.string():
            columns = columns.set_column(index, name, columns[name].cast(draw(st.sampled_from(TEXT_TYPES))))
    harm = draw(st.sampled_from(("none", "none", "flip", "cut", "empty"))), draw(SHARE)
    options = {"skip_invalid": draw(st.booleans())}
    return Table(rows, columns, draw(COMPRESSION), harm, options, draw(st.booleans()))


def harmed(content: bytes, how: str, where: float) -> bytes:
    """A file's bytes with one changed, or cut off."""
    at = int(where * len(content))
    if how == "flip":
        return content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :]
    return {"none": content, "cut": content[:at], "empty": b""}[how]


def check_table(table: Table, folder) -> None:
    """Read the file; where its bytes were changed but still say the same, it means the same."""
    path = folder / "rows.parquet"
    pq.write_table(table.columns, path, compression=table.compression)
    path.write_bytes(harmed(path.read_bytes(), *table.harm))
    meant = {f"{path}, row {index}": row.meaning for index, row in enumerate(table.rows, 1)}
    check_rows(path, meant if same(path, table.columns) else None, table.options, table.streams)


def same(path, columns: pa.Table) -> bool:
    """Whether a file says what it said, as far as another reader can tell."""
    try:
        return pq.read_table(path).to_pylist() == columns.to_pylist()
    except Exception:
        return False


KINDS = [Kind("Parquet", tables(), check_table, 8)]
