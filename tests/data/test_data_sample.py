"""A sample of the data, for a trial: few rows, and the same ones in every run."""

import pytest
from helpers import write_jsonl

from lit_vapo.data.datamodule import PreferenceDataModule, PromptDataModule, SFTDataModule
from lit_vapo.data.readers import read_all


def pairs(name, count):
    return [{"prompt": f"{name} {i}", "chosen": "good", "rejected": "bad"} for i in range(count)]


@pytest.fixture
def file(tmp_path):
    return write_jsonl(tmp_path / "a.jsonl", pairs("a", 40))


def held(data, split="train"):
    """What rows of a split begin with."""
    rows = data.prompt_rows(split) if isinstance(data, PromptDataModule) else data.preference_rows(split)
    return [row["place"] for row in rows]


@pytest.mark.parametrize("kind", [PreferenceDataModule, PromptDataModule, SFTDataModule])
def test_every_stage_takes_a_sample(kind, tiny_model_dir, file):
    whole = kind(tiny_model_dir, file, validation_fraction=0.0)
    few = kind(tiny_model_dir, file, validation_fraction=0.0, sample=5)
    assert len(held(few)) == 5
    # In the order of the file, and not its first rows.
    assert held(few) == [place for place in held(whole) if place in held(few)]
    assert held(few) != held(whole)[:5]
    assert held(kind(tiny_model_dir, file, validation_fraction=0.0, sample=99)) == held(whole)


def test_the_order_of_a_file_plays_no_part(tiny_model_dir, file, tmp_path):
    turned = write_jsonl(tmp_path / "b.jsonl", pairs("a", 40)[::-1])
    one, other = (PreferenceDataModule(tiny_model_dir, f, sample=6, validation_fraction=0.0) for f in (file, turned))
    ids = [[row["example_id"] for row in data.preference_rows("train")] for data in (one, other)]
    assert ids[0] == ids[1][::-1]


def test_each_set_has_a_sample_and_parts_are_set_aside_from_it(tiny_model_dir, file, tmp_path):
    other = write_jsonl(tmp_path / "b.jsonl", pairs("b", 30))
    data = PreferenceDataModule(tiny_model_dir, file, preferences_test=other, validation_fraction=0.4, sample=10)
    assert len(held(data)) + len(held(data, "val")) == 10
    assert 0 < len(held(data, "val")) < 10
    assert len(held(data, "test")) == 10


def test_a_mixture_keeps_its_ratios(tiny_model_dir, file, tmp_path):
    other = write_jsonl(tmp_path / "b.jsonl", pairs("b", 30))
    data = PreferenceDataModule(tiny_model_dir, {file: 7, other: 3}, validation_fraction=0.0, sample=10)
    names = [place.partition(",")[0][-len("a.jsonl") :] for place in held(data)]
    assert names == ["a.jsonl"] * 7 + ["b.jsonl"] * 3


def test_what_is_not_drawn_is_not_read(file):
    seen = []
    read_all(file, "data.preferences", seen.append, False, sample=5)
    assert len(seen) == 5


def test_a_stream_takes_none(tiny_model_dir, file):
    with pytest.raises(ValueError, match=r"data.sample: expected null with data.streaming .*, got 5"):
        PreferenceDataModule(tiny_model_dir, file, streaming=True, validation_fraction=0.0, sample=5)
    with pytest.raises(ValueError, match=r"data.sample: .*got 0"):
        PreferenceDataModule(tiny_model_dir, file, sample=0)


def test_a_sample_of_a_mixture_is_no_larger_than_it_says(tiny_model_dir, file, tmp_path):
    other = write_jsonl(tmp_path / "b.jsonl", pairs("b", 30))
    halves = PreferenceDataModule(tiny_model_dir, {file: 1, other: 1}, validation_fraction=0.0, sample=3)
    assert len(held(halves)) <= 3
    few = PreferenceDataModule(tiny_model_dir, {file: 9, other: 1}, validation_fraction=0.0, sample=5)
    with pytest.raises(ValueError, match=r"a row of every source in a sample of 5 \(data.sample\), got"):
        held(few)
