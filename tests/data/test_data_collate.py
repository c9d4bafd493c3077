"""Batches, padded with a token that is also a real one: lengths alone say what counts."""

import torch

from lit_vapo.data.collate import Collator, PreferenceBatch, PromptBatch, SFTBatch
from lit_vapo.types import Prompt

END = 0  # pads, and ends every response
LARGE = 2**63 - 1


def pair(chosen, rejected, prompt_length, margin=0.0, example_id=0):
    return {
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        "prompt_length": prompt_length,
        "margin": margin,
        "probability": 1.0 - margin / 2,
        "weight": 1.0 + margin,
        "example_id": example_id,
    }


ROWS = [pair([1, 2, 3, END], [1, 2, END], 2, 0.5, LARGE), pair([4, END], [4, 5, END, 6, END], 1, 0.0, 3)]


def test_pairs_are_padded_on_the_right_each_side_to_its_own_width():
    batch = Collator().preferences(ROWS)
    assert isinstance(batch, PreferenceBatch)
    assert batch.chosen_ids.tolist() == [[1, 2, 3, END], [4, END, END, END]]
    assert batch.rejected_ids.tolist() == [[1, 2, END, END, END], [4, 5, END, 6, END]]
    assert batch.chosen_lengths.tolist() == [4, 2]
    assert batch.rejected_lengths.tolist() == [3, 5]
    assert batch.prompt_lengths.tolist() == [2, 1]


def test_labels_and_identities_survive():
    labels = Collator().preferences(ROWS).labels
    assert {t.dtype for t in labels[:3]} == {torch.float32}
    assert labels.margin.tolist() == [0.5, 0.0]
    assert labels.probability.tolist() == [0.75, 1.0]
    assert labels.weight.tolist() == [1.5, 1.0]
    assert labels.example_ids.dtype == torch.int64
    assert labels.example_ids.tolist() == [LARGE, 3]


def test_lengths_give_back_every_row():
    batch = Collator().preferences(ROWS)
    for row, ids, size in zip(ROWS, batch.rejected_ids, batch.rejected_lengths, strict=True):
        assert ids[:size].tolist() == row["rejected_ids"]


def test_prompts_are_padded_on_the_left_and_move_as_one():
    rows = [
        {"prompt_ids": ids, "prompt": str(ids), "asked": Prompt(str(ids)), "example_id": len(ids), "columns": {}}
        for ids in ([END, 2, END], [5])
    ]
    batch = Collator().prompts(rows)
    assert batch.input_ids.tolist() == [[END, 2, END], [END, END, 5]]
    for row, ids, size in zip(rows, batch.input_ids, batch.lengths, strict=True):
        assert ids[len(ids) - size :].tolist() == row["prompt_ids"]
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, PromptBatch)
    assert {t.device.type for t in (moved.input_ids, moved.lengths, moved.example_ids)} == {"meta"}
    assert moved.prompts == [r["prompt"] for r in rows]


def test_demonstrations_are_the_preferred_responses():
    batch = Collator().sft(ROWS)
    assert isinstance(batch, SFTBatch)
    assert batch.input_ids.tolist() == [[1, 2, 3, END], [4, END, END, END]]
    assert batch.lengths.tolist() == [4, 2]
    assert batch.prompt_lengths.tolist() == [2, 1]
