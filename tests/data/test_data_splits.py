"""Splits that depend on a row alone, and features in place of tokens."""

import random

import pytest
import torch
from torch.utils.data import DataLoader

from lit_vapo.data.splits import FeatureRows, set_aside
from lit_vapo.data.tokenise import stable_id
from lit_vapo.types import PairLabels


def rows(count, per_prompt=1, generic=False):
    prompts = ["Review:" if generic else f"p{i // per_prompt}" for i in range(count)]
    return [{"prompt": p, "identity": p, "example_id": stable_id(p, str(i))} for i, p in enumerate(prompts)]


def ids(part):
    return {row["example_id"] for row in part}


@pytest.mark.parametrize("generic", [False, True])
def test_order_and_other_rows_change_nothing(generic):
    everything = rows(1000, generic=generic)
    train, held, _ = set_aside(everything, 0.2)
    assert ids(train).isdisjoint(ids(held))
    assert len(train) + len(held) == 1000
    shuffled = random.Random(0).sample(everything, 1000)
    assert [ids(part) for part in set_aside(shuffled, 0.2)] == [ids(train), ids(held), set()]
    some = shuffled[:300]
    assert ids(set_aside(some, 0.2)[1]) == ids(held) & ids(some)


def test_both_parts_keep_the_order_of_the_rows():
    everything = rows(200)
    for part in set_aside(everything, 0.3):
        assert part == [row for row in everything if row in part]


def test_pairs_of_a_prompt_stay_together():
    train, held, _ = set_aside(rows(1000, per_prompt=4), 0.2)
    assert held
    assert {r["prompt"] for r in train}.isdisjoint(r["prompt"] for r in held)


def test_a_generic_prompt_splits_by_pair():
    train, held, _ = set_aside(rows(1000, generic=True), 0.2)
    assert 150 < len(held) < 250
    assert len(train) == 1000 - len(held)


def test_equal_pairs_land_on_the_same_side():
    twice = [row for row in rows(300, generic=True) for _ in range(2)]
    train, held, _ = set_aside(twice, 0.3)
    assert ids(train).isdisjoint(ids(held))


def test_no_fraction_sets_nothing_aside():
    everything = rows(50)
    assert set_aside(everything, 0.0) == (everything, [], [])


def test_features_are_indexed_by_whole_batches():
    features = FeatureRows(
        torch.arange(10.0)[:, None],
        -torch.arange(10.0)[:, None],
        PairLabels(torch.arange(10.0) / 10, torch.full((10,), 0.75), torch.arange(10.0) * 2, torch.arange(10)),
    )
    assert len(features) == 10
    batches = list(DataLoader(features, batch_size=4, collate_fn=lambda batch: batch))
    assert [len(b.labels.margin) for b in batches] == [4, 4, 2]
    assert batches[1].chosen[:, 0].tolist() == [4, 5, 6, 7]
    assert batches[1].rejected[:, 0].tolist() == [-4, -5, -6, -7]
    assert [column.tolist() for column in batches[2].labels[1:4]] == [[0.75, 0.75], [16, 18], [8, 9]]
    assert features[3].labels.example_ids.tolist() == [3]
