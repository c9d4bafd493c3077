"""Mixtures: their shares, their size, and that the order of a file plays no part."""

import random
from collections import Counter
from itertools import islice

import pytest
import yaml
from helpers import write_jsonl
from jsonargparse import ArgumentParser

from lit_vapo.data.datamodule import PreferenceDataModule, PromptDataModule
from lit_vapo.data.mixing import counts, draw, interleave, row_hash, shares, stream_rows
from lit_vapo.data.sources import Row


def pairs(name, count):
    return [{"prompt": f"{name} {i}", "chosen": "good", "rejected": "bad"} for i in range(count)]


@pytest.fixture
def two(tmp_path):
    """Files of 40 and of 30 pairs."""
    return [write_jsonl(tmp_path / f"{name}.jsonl", pairs(name, count)) for name, count in (("a", 40), ("b", 30))]


@pytest.mark.parametrize(
    ("sizes", "ratios", "expected"),
    [
        # 40 / 0.7 = 57.1 and 30 / 0.3 = 100: the first is used up, with 0.3 · 57.1 = 17.1 of the second.
        ([40, 30], [0.7, 0.3], [40, 17]),
        ([40, 30], [7, 3], [40, 17]),
        ([10, 10], [1, 1], [10, 10]),
        ([3, 9], [0.7, 0.3], [3, 1]),  # 0.7 · (3 / 0.7) is a little under 3 in binary
        ([5, 100, 100], [1, 2, 4], [5, 10, 20]),
        ([3], [0.2], [3]),
    ],
)
def test_a_mixture_is_as_large_as_no_repetition_allows(sizes, ratios, expected):
    assert counts(sizes, shares(dict(zip("abc", ratios, strict=False)), "k")) == expected


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_ratios_are_above_zero(ratio):
    with pytest.raises(ValueError, match=f"data.preferences: expected ratios above 0, got {ratio} for 'b'"):
        shares({"a": 1.0, "b": ratio}, "data.preferences")


def test_an_empty_mapping_is_refused():
    with pytest.raises(ValueError, match="k: expected at least one source, got an empty mapping"):
        shares({}, "k")


def test_the_lowest_hashes_are_drawn():
    assert draw([5, 1, 4, 2], 2) == [1, 3]
    assert draw([5, 1, 4, 2], 9) == [1, 3, 2, 0]


def test_a_row_keeps_its_hash_in_other_files():
    assert row_hash(Row({"a": 1, "b": None, "c": [2]}, "x")) == row_hash(Row({"c": [2], "a": 1}, "y"))
    assert row_hash(Row({"a": 1}, "x")) != row_hash(Row({"a": 2}, "x"))


def made(kind, model, sources, **options):
    return kind(model, preferences=sources, **{"validation_fraction": 0.0, **options})


def test_held_rows_are_mixed_in_their_shares_whatever_the_order_of_the_files(tiny_model_dir, two, tmp_path):
    mixed = made(PreferenceDataModule, tiny_model_dir, dict(zip(two, (0.7, 0.3), strict=True)))
    found = [row["prompt"] for row in mixed.preference_rows("train")]
    assert Counter(prompt[0] for prompt in found) == {"a": 40, "b": 17}
    assert len(set(found)) == 57
    shuffled = [
        write_jsonl(tmp_path / f"shuffled_{name}.jsonl", random.Random(0).sample(pairs(name, count), count))
        for name, count in (("a", 40), ("b", 30))
    ]
    other = made(PreferenceDataModule, tiny_model_dir, dict(zip(shuffled, (7, 3), strict=True)))
    assert [row["prompt"] for row in other.preference_rows("train")] == found
    # The ppo stage draws the same rows for its prompts.
    prompts = made(PromptDataModule, tiny_model_dir, dict(zip(two, (0.7, 0.3), strict=True)))
    assert [row["prompt"] for row in prompts.prompt_rows("train")] == found


def test_shares_are_those_of_valid_rows(tiny_model_dir, two, tmp_path):
    bad = write_jsonl(tmp_path / "bad.jsonl", [{**row, "chosen": "bad"} for row in pairs("c", 90)] + pairs("c", 10))
    mixed = made(PreferenceDataModule, tiny_model_dir, {two[0]: 1, bad: 1}, skip_invalid=True)
    with pytest.warns(
        UserWarning,
        match=r"data.preferences: left out 90 of 100 rows .two equal responses.; the first: .*bad.jsonl, line 1",
    ):
        found = mixed.preference_rows("train")
    assert Counter(row["prompt"][0] for row in found) == {"a": 10, "c": 10}


def test_a_source_that_would_give_no_row_is_named(tiny_model_dir, two):
    mixed = made(PreferenceDataModule, tiny_model_dir, {two[0]: 1, two[1]: 0.001})
    with pytest.raises(ValueError, match=r"data.preferences: expected ratios that leave a row of every source, got .*"):
        mixed.prepare_data()


def test_streams_are_interleaved_by_their_shares_until_one_ends():
    found = list(interleave([iter("a" * 9000), iter("b" * 300)], [0.9, 0.1], random.Random(0)))
    assert found.count("b") == 300
    # The count of a before the 301st b is negative binomial: mean 301 · 9, deviation √(301 · 0.9) / 0.1.
    assert abs(found.count("a") - 2709) < 4 * 165
    assert found == list(interleave([iter("a" * 9000), iter("b" * 300)], [0.9, 0.1], random.Random(0)))


def test_lists_stream_one_after_another_and_mappings_mixed(two):
    listed = [row.values["prompt"][0] for row in stream_rows(two, "k", random.Random(0))]
    assert listed == ["a"] * 40 + ["b"] * 30
    mixed = [row.values["prompt"][0] for row in islice(stream_rows({two[0]: 1, two[1]: 1}, "k", random.Random(0)), 30)]
    assert mixed != sorted(mixed)


@pytest.mark.parametrize(
    "words",
    [
        ['--data.preferences={"a/x.jsonl": 0.7, "org/set:part:test": 3}'],
        ["--data.preferences={a/x.jsonl: 0.7, 'org/set:part:test': 3}"],
        ["--config=mixture.yaml"],
    ],
)
def test_ratios_are_taken_from_the_command_line_and_from_files(words, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ratios = {"a/x.jsonl": 0.7, "org/set:part:test": 3.0}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"data": {"preferences": ratios}}))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(PreferenceDataModule, "data")
    config = parser.parse_args([*words, f"--data.tokenizer={tiny_model_dir}", "--data.prompts=[a.jsonl, b.jsonl]"])
    assert config.data.preferences == ratios
    data = PreferenceDataModule(**config.data.as_dict())
    assert data.preference_sources["train"] == ratios
    assert data.prompt_sources["train"] == ["a.jsonl", "b.jsonl"]
    # A run writes its configuration, and reads it again when it is resumed.
    (tmp_path / "saved.yaml").write_text(parser.dump(config, skip_none=False))
    assert parser.parse_args(["--config=saved.yaml"]).data.preferences == ratios
