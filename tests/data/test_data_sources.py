"""Where rows come from: line numbers, the hub's splits, files that cannot be read."""

import itertools
import json

import datasets
import pytest
from helpers import write_jsonl

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
    path.write_text('{"prompt": "x"}\n' * 3 + "broken\n")
    assert [r.values["prompt"] for r in itertools.islice(iterate_rows(str(path), "k"), 3)] == ["x"] * 3
    with pytest.raises(ValueError, match="a.jsonl, line 4: expected a JSON object"):
        list(iterate_rows(str(path), "k"))


@pytest.mark.parametrize("lazily", [False, True])
def test_sources_without_rows_are_named(tmp_path, lazily):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match="k: expected at least one row, got none in .*a.jsonl"):
        list(iterate_rows(str(tmp_path / "a.jsonl"), "k", lazily))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="a.parquet: expected a Parquet file, got one that cannot be read"):
        list(iterate_rows(str(tmp_path / "a.parquet"), "k", lazily))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"prompt": "x"}\n{"prompt": "\xff"}\n',
            r"a.jsonl, line 2: expected a JSON object, got malformed",
        ),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', r"a.jsonl, line 2: expected a JSON object, got malformed JSON"),
        ("a.jsonl", b'{"prompt": "x"}\n"text"\n', r"a.jsonl, line 2: expected a JSON object, got str"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: expected a JSON object, got list"),
        ("a.json", b'[{"prompt": "x"},\n 3]', "a.json, line 2: expected a JSON object, got int"),
        ("a.json", b'[{"prompt": "x"},\n {"prompt', "a.json, line 2: expected a JSON object, got malformed JSON"),
        ("a.json", b'[{"prompt": "x"}\n', "a.json, line 2: expected a JSON object, got malformed JSON"),
        ("a.json", b"[]", "data.preferences: expected at least one row, got none"),
        ("a.json", b'["\xff"]', "a.json: expected a JSON array, got malformed text"),
        ("a.jsonl", b"\n", "data.preferences: expected at least one row, got none"),
        ("a.csv", b"x", r"data.preferences: expected a .jsonl, .json or .parquet file, got '.*a.csv'"),
        ("a.parquet", b"PAR1 and no more", r"a.parquet: expected a Parquet file, got one that cannot be read"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name), "data.preferences")


def test_a_glob_without_files_is_named_with_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"data.prompts: expected a file, got '.*\*.jsonl', which does not exist"):
        load_rows(str(tmp_path / "*.jsonl"), "data.prompts")


def test_a_missing_file_is_not_taken_for_a_hub_name():
    with pytest.raises(ValueError, match=r"data.prompts: expected a file, got 'gone.jsonl', which does not exist"):
        load_rows("gone.jsonl", "data.prompts")
