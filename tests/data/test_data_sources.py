"""Where rows come from: line numbers, the hub's splits, files that cannot be read."""

import itertools
import json
import re
from decimal import Decimal

import datasets
import pyarrow
import pytest
from helpers import write_jsonl
from pyarrow import parquet

from lit_vapo.data.columns import LOOK
from lit_vapo.data.labels import read_labels
from lit_vapo.data.sources import iterate_rows, load_rows

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture
def hub(monkeypatch):
    """A hub of two-row data sets; what it was asked for."""
    asked, read = [], datasets.load_dataset

    def load_dataset(name, config=None, *, split, streaming, **files):
        if files:
            return read(name, split=split, streaming=streaming, **files)
        asked.append((name, config, split))
        table = datasets.Dataset.from_list([{"prompt": f"{name} {split} {i}"} for i in range(2)])
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_jsonl_parquet_globs_and_lists_agree(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    first = write_jsonl(tmp_path / "one.jsonl", rows[:2])
    second = write_jsonl(tmp_path / "two.jsonl", rows[2:])
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "all.parquet")
    for source in ([first, second], str(tmp_path / "*.jsonl"), str(tmp_path / "all.parquet")):
        assert [dict(r.values) for r in load_rows(source, "data.preferences")] == rows


def test_line_numbers_count_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x"}\n\n  \n{"prompt": "y"}\n')
    assert [(r.values["prompt"], r.place) for r in load_rows(str(path), "k")] == [
        ("x", f"{path}, line 1"),
        ("y", f"{path}, line 4"),
    ]


def test_text_beyond_ascii_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"prompt": "naïve 🎬\u2028end"}\n'.encode())
    assert load_rows(str(path), "k")[0].values == {"prompt": "naïve 🎬\u2028end"}


def test_parquet_keeps_conversations_numbers_and_row_numbers(tmp_path):
    rows = [{"chosen": TURNS, "rejected": TURNS[:1], "margin": m} for m in (0.5, None)]
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    found = load_rows(str(path), "k")
    assert [dict(r.values) for r in found] == rows
    assert found[1].place == f"{path}, row 2"


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("org/set", ("org/set", None, "train")),
        ("org/set:part", ("org/set", "part", "train")),
        ("org/set:part:test", ("org/set", "part", "test")),
        ("org/set::test", ("org/set", None, "test")),
    ],
)
def test_hub_names_choose_configuration_and_split(hub, source, asked):
    row = load_rows(source, "data.prompts")[1]
    assert hub == [asked]
    assert row.values == {"prompt": f"org/set {asked[2]} 1"}
    assert row.place == f"{source} ({asked[2]}), row 2"


def test_files_and_hub_names_mix_in_the_order_given(hub, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "mine"}])
    found = load_rows(["org/set", file], "k")
    assert [r.values["prompt"] for r in found] == ["org/set train 0", "org/set train 1", "mine"]


def test_globs_are_read_in_the_order_of_their_names(tmp_path):
    for name in "cab":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": name}])
    assert [r.values["prompt"] for r in load_rows(str(tmp_path / "*.jsonl"), "k")] == ["a", "b", "c"]


def test_reading_writes_nothing_beside_the_data(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}])
    datasets.Dataset.from_list([{"prompt": "b"}]).to_parquet(tmp_path / "b.parquet")
    before = sorted(tmp_path.rglob("*"))
    load_rows([str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")], "k")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_with_the_lines_of_its_rows(tmp_path, indent):
    rows = [{"prompt": "a\n[b", "n": i} for i in range(3)]
    path = tmp_path / "dataset.json"
    path.write_bytes(b"\xef\xbb\xbf\n " + json.dumps(rows, indent=indent).encode())
    found = load_rows(str(path), "k")
    assert [r.values for r in found] == rows
    # With an indentation a row takes four lines: {, prompt, n, }.
    lines = [2, 2, 2] if indent is None else [3, 7, 11]
    assert [r.place for r in found] == [f"{path}, line {line}" for line in lines]


def test_lazily_read_rows_are_the_same(hub, tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": TURNS, "rejected": TURNS[:1]} for i in range(5)]
    file = write_jsonl(tmp_path / "one.jsonl", rows)
    parquet = str(tmp_path / "two.parquet")
    datasets.Dataset.from_list(rows).to_parquet(parquet)
    for source in (file, parquet, "org/set", [file, parquet, "org/set"]):
        assert [(dict(r.values), r.place) for r in iterate_rows(source, "k")] == [
            (dict(r.values), r.place) for r in load_rows(source, "k")
        ]


def test_lazily_read_files_are_not_read_to_the_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x"}\n' * (LOOK + 3))
    with path.open("a") as file:
        file.write("broken\n")
    rows = iterate_rows(str(path), "k")
    assert [r.values["prompt"] for r in itertools.islice(rows, 3)] == ["x"] * 3
    assert [r.place for r in rows if r.problem] == [f"{path}, line {LOOK + 4}"]


@pytest.mark.parametrize("lazily", [False, True])
def test_sources_without_rows_are_named(tmp_path, lazily):
    (tmp_path / "a.jsonl").touch()
    datasets.Dataset.from_dict({"prompt": []}).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "c.json").write_text("[]")
    (tmp_path / "d.jsonl").write_text("\n \n")
    for name in ("a.jsonl", "b.parquet", "c.json", "d.jsonl"):
        with pytest.raises(ValueError, match=f"k: expected at least one row, got none in .*{name}"):
            list(iterate_rows(str(tmp_path / name), "k", lazily=lazily))


GOOD = b'{"prompt": "x"}'
# What stands in the place of a row, and what is said of it.
BAD_ROWS = {
    "no UTF-8": (b'{"prompt": "\xff"}', "got malformed text, which is no UTF-8"),
    "half a row": (b'{"prompt": ', "got malformed JSON (Expecting value, at character "),
    "two rows": (GOOD + GOOD, "got malformed JSON (more after its end, at character 16)"),
    "a text": (b'"text"', "got str"),
    "a list": (b"[1]", "got list"),
    "a key twice": (b'{"prompt": "a", "prompt": "b"}', "got the key 'prompt' twice"),
    "a key of a message twice": (b'{"prompt": [{"role": "a", "role": "b"}]}', "got the key 'role' twice"),
    "NaN": (b'{"margin": NaN}', "got NaN, which is no JSON"),
    "infinity": (b'{"margin": -Infinity}', "got -Infinity, which is no JSON"),
    "digits without end": (b'{"margin": ' + b"1" * 5000 + b"}", "got a number of 5000 digits"),
    "depth": (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "got one nested too deeply"),
    "control characters": (b'{"prompt": "a\x00"}', "got malformed JSON (Invalid control character at"),
}
# From these an array cannot go on: where the next row begins cannot be told.
BREAKS = {"no UTF-8", "half a row", "depth", "control characters"}


@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("lazily", [False, True])
def test_what_is_wrong_with_one_line_is_said_of_that_line(tmp_path, kind, lazily):
    content, problem = BAD_ROWS[kind]
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + content + b"\n\n" + GOOD)
    rows = list(iterate_rows(str(path), "k", lazily=lazily))
    assert [(r.values, r.place) for r in rows if not r.problem] == [
        ({"prompt": "x"}, f"{path}, line 1"),
        ({"prompt": "x"}, f"{path}, line 4"),
    ]
    with pytest.raises(
        ValueError, match="^" + re.escape(f"{path}, line 2: expected a JSON object, {problem}")
    ) as error:
        rows[1].sound()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 120


@pytest.mark.parametrize("kind", [kind for kind in BAD_ROWS if kind != "two rows"])
def test_what_is_wrong_with_one_row_of_an_array_is_said_of_it_unless_the_array_breaks_off(tmp_path, kind):
    content, problem = BAD_ROWS[kind]
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + GOOD + b",\n" + content + b",\n" + GOOD + b"]")
    if kind in BREAKS:
        with pytest.raises(ValueError, match=r"a.json(, line 2)?: expected a JSON (object|array), got malformed"):
            load_rows(str(path), "k")
        return
    rows = load_rows(str(path), "k")
    assert [bool(r.problem) for r in rows] == [False, True, False]
    assert (rows[1].place, rows[1].problem) == (f"{path}, line 2", f"expected a JSON object, {problem}")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_on_any_system(tmp_path, end):
    path = tmp_path / "a.jsonl"
    path.write_bytes(end.join(['{"prompt": "a"}', "", '{"prompt": "b"}']).encode())
    assert [(r.values["prompt"], r.place) for r in load_rows(str(path), "k")] == [
        ("a", f"{path}, line 1"),
        ("b", f"{path}, line 3"),
    ]


def test_an_array_may_be_called_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('[{"prompt": "a"},\n{"prompt": "b"}]\n')
    assert [r.values["prompt"] for r in load_rows(str(path), "k")] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"prompt": "x"}\n', "a.json, line 2: expected a JSON object, got malformed JSON"),
        (
            "a.json",
            b'[{"prompt": "x"}]\n{}',
            "a.json, line 2: expected the end of the file after a JSON array",
        ),
        ("a.jsonl", '{"prompt": "x"}'.encode("utf-16"), "a.jsonl: expected text in UTF-8, got another encoding"),
        ("a.jsonl", '{"prompt": "x"}'.encode("utf-16-be"), "a.jsonl: expected text in UTF-8, got another encoding"),
        ("a.csv", b"x", r"data.preferences: expected a .jsonl, .json or .parquet file, got '.*a.csv'"),
        ("a.parquet", b"", r"a.parquet: expected a Parquet file, got one that cannot be read"),
        ("a.parquet", b"PAR1 and no more", r"a.parquet: expected a Parquet file, got one that cannot be read"),
    ],
)
@pytest.mark.parametrize("lazily", [False, True])
def test_unreadable_files_are_named(tmp_path, name, content, message, lazily):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(iterate_rows(str(tmp_path / name), "data.preferences", lazily=lazily))


def test_parquet_of_every_kind_of_text_and_number_is_read(tmp_path):
    texts = ["naïve", "b"]
    kinds = [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()]
    columns = {f"prompt{i}": pyarrow.array(texts, kind) for i, kind in enumerate(kinds)}
    columns["coded"] = pyarrow.array(texts).dictionary_encode()
    columns["margin"] = pyarrow.array([Decimal("1.50"), None], pyarrow.decimal128(9, 2))
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    rows = load_rows(str(tmp_path / "a.parquet"), "k")
    assert [[r.values[name] for name in columns if name != "margin"] for r in rows] == [["naïve"] * 4, ["b"] * 4]
    assert read_labels(rows[0]).margin == 1.5


def test_parquet_of_bytes_gives_no_text(tmp_path):
    parquet.write_table(pyarrow.table({"subset": pyarrow.array([b"x"])}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet, row 1: expected text in column 'subset', got bytes"):
        read_labels(load_rows(str(tmp_path / "a.parquet"), "k")[0])


def test_text_of_parquet_that_is_no_unicode_is_the_fault_of_its_row(tmp_path):
    raw = pyarrow.array([b"a", b"\xff", b"c"]).cast(pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "a.parquet")
    rows = load_rows(str(tmp_path / "a.parquet"), "k")
    assert [r.values.get("prompt") for r in rows] == ["a", None, "c"]
    with pytest.raises(ValueError, match="a.parquet, row 2: expected a row of Parquet that can be read, got: 'utf-8'"):
        rows[1].sound()


def test_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: expected .* columns of different names, got \['prompt'\] more"):
        load_rows(str(tmp_path / "a.parquet"), "k")


def test_a_damaged_part_of_a_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"prompt": [f"text {i}" for i in range(5000)]}), path, compression="snappy")
    content = bytearray(path.read_bytes())
    content[40:2000] = bytes(1960)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.parquet: expected a Parquet file, got one that cannot be read"):
        load_rows(str(path), "k")


def test_columns_of_mixed_types_come_back_from_parquet(tmp_path):
    rows = [{"tools": [{"default": value}]} for value in (1, "x")]
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(tmp_path / "a.parquet")
    assert [dict(r.values) for r in load_rows(str(tmp_path / "a.parquet"), "k")] == rows


@pytest.mark.parametrize("name", ["a[1].jsonl", "a b.jsonl", "wh*t?.jsonl", "ünï.jsonl"])
def test_a_file_that_is_there_is_no_pattern(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / name, [{"prompt": "a"}])
    for source in (str(tmp_path / name), f"~/{name}"):
        assert [r.values["prompt"] for r in load_rows(source, "k")] == ["a"]


@pytest.mark.parametrize("source", ["data/gone.csv", "a/b/c", "gone.json.gz", "with space", "gone[1]", "", "c:\\x"])
def test_what_can_be_no_name_on_the_hub_is_a_missing_file(source):
    with pytest.raises(ValueError, match=r"data.prompts: expected a (file, got .*, which does not exist|.jsonl)"):
        load_rows(source, "data.prompts")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="k: expected a .jsonl, .json or .parquet file, got "):
        load_rows(str(tmp_path), "k")


def test_a_glob_without_files_is_named_with_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"data.prompts: expected a file, got '.*\*.jsonl', which does not exist"):
        load_rows(str(tmp_path / "*.jsonl"), "data.prompts")


def test_a_missing_file_is_not_taken_for_a_hub_name():
    with pytest.raises(ValueError, match=r"data.prompts: expected a file, got 'gone.jsonl', which does not exist"):
        load_rows("gone.jsonl", "data.prompts")
