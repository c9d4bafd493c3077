"""Columns beside the prompt: which of them travel, and that none is missing when a reward wants it."""

from datetime import date

import helpers
import pytest
import torch

from lit_vapo.data.columns import further
from lit_vapo.data.datamodule import PromptDataModule


def data(model, rows, tmp_path, **kwargs):
    file = helpers.write_jsonl(tmp_path / "rows.jsonl", rows)
    kind = kwargs.pop("kind", "prompts")
    return PromptDataModule(model, **{kind: file}, validation_fraction=0.0, max_prompt_length=48, **kwargs)


def test_columns_reach_the_batch(tiny_model_dir, tmp_path):
    rows = [
        {"prompt": "the film", "answer": {"value": [1, None]}, "level": 2},
        {"prompt": "the plot", "answer": "x", "extra": None},
    ]
    (batch,) = data(tiny_model_dir, rows, tmp_path).prompt_batches("train", 2)
    assert batch.columns == {"answer": [{"value": [1, None]}, "x"], "level": [2, None], "extra": [None, None]}
    assert batch.to(torch.device("cpu")).columns == batch.columns


def test_the_prompt_s_own_columns_stay(tiny_model_dir, tmp_path):
    messages = [{"role": "user", "content": "the film"}]
    rows = [{"question": messages, "system": "Be brief.", "tools": None, "images": [], "subset": "a", "weight": 2}]
    (batch,) = data(tiny_model_dir, rows, tmp_path, columns={"prompt": "question"}).prompt_batches("train", 1)
    assert batch.columns == {"subset": ["a"], "weight": [2]}


def test_what_makes_a_preference_stays(tiny_model_dir, tmp_path):
    pair = {"prompt": "the film", "chosen": " good", "rejected": " bad", "margin": 1.0, "subset": "a", "id": 7}
    numbered = {"input": "the plot", "output_1": " good", "output_2": " bad", "label": 1, "id": 8}
    for row in (pair, numbered):
        (batch,) = data(tiny_model_dir, [row], tmp_path, kind="preferences").prompt_batches("train", 1)
        assert batch.columns == {"id": [row["id"]]}


def test_a_prompt_that_several_pairs_answer_has_the_columns_of_the_first(tiny_model_dir, tmp_path):
    rows = [{"prompt": "the film", "chosen": f" {i}", "rejected": " bad", "id": i} for i in range(3)]
    (batch,) = data(tiny_model_dir, rows, tmp_path, kind="preferences").prompt_batches("train", 3)
    assert batch.columns == {"id": [0]}


def test_a_file_of_prompts_keeps_both_of_two_that_are_the_same(tiny_model_dir, tmp_path):
    rows = [{"prompt": "the film", "answer": i} for i in range(2)]
    (batch,) = data(tiny_model_dir, rows, tmp_path).prompt_batches("train", 2)
    assert batch.columns == {"answer": [0, 1]}
    assert batch.example_ids[0] == batch.example_ids[1]


@pytest.mark.parametrize("value", [date(2020, 1, 1), float("nan"), {"at": date(2020, 1, 1)}, b"bytes", {1, 2}])
def test_what_json_cannot_say_stays(value):
    assert further({"prompt": "x", "when": value, "id": 1}) == {"id": 1}


def test_a_missing_column_is_named(tiny_model_dir, tmp_path):
    rows = [{"prompt": "the film", "answer": 1, "level": 2}, {"prompt": "the plot", "level": 2}]
    made = data(tiny_model_dir, rows, tmp_path)
    made.check_columns(())
    made.check_columns(("level",))
    message = (
        r"rows.jsonl, line 2: expected a column 'answer' .* since the reward is computed from it, got level besides"
    )
    with pytest.raises(ValueError, match=message):
        made.check_columns(("level", "answer"))


def test_prompts_that_stream_are_not_looked_through(tiny_model_dir, tmp_path):
    pairs = [{"prompt": f"the film {i}", "chosen": " good", "rejected": " bad"} for i in range(4)]
    test = helpers.write_jsonl(tmp_path / "test.jsonl", [{"prompt": "the film", "level": 1}])
    options = {"kind": "preferences", "streaming": True, "stream_buffer": 8, "batch_size": 2, "prompts_test": test}
    made = data(tiny_model_dir, pairs, tmp_path, preferences_test=test, **options)
    made.check_columns(("level",))
    with pytest.raises(ValueError, match="test.jsonl, line 1: expected a column 'answer'"):
        made.check_columns(("answer",))
