"""Real data and several processes: rows that are no preference, ends of turns, shares of the rows."""

import pytest
import torch
from helpers import tiny_preferences, write_jsonl
from lightning.pytorch import Trainer
from torch.utils.data import DistributedSampler

from lit_vapo.data.collate import pair_labels
from lit_vapo.data.datamodule import PreferenceDataModule, PromptDataModule
from lit_vapo.data.sampler import EpochSampler, LengthSampler
from lit_vapo.data.sources import load_rows
from lit_vapo.data.splits import DealtRows, FeatureRows


def test_a_data_set_that_the_hub_does_not_have_is_named():
    with pytest.raises(ValueError, match="k: expected a file or a data set on the hub, got 'owner/name' "):
        load_rows("owner/name", "k")


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}


def loaded(model, path, **options):
    return PreferenceDataModule(model, path, validation_fraction=0.0, **options)


def test_invalid_rows_are_left_out_on_request_alone(tiny_model_dir, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, {**GOOD, "chosen": 3}, {**GOOD, "rejected": None}])
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: expected text .* data.skip_invalid=true leaves such rows"):
        loaded(tiny_model_dir, path).prepare_data()
    with pytest.warns(UserWarning, match=r"data\.preferences: left out 2 of 3 rows .invalid.; the first: .*line 2"):
        assert len(loaded(tiny_model_dir, path, skip_invalid=True).preference_rows("train")) == 1


def test_rows_of_no_use_are_left_out_with_a_line_for_each_kind(tiny_model_dir, tmp_path):
    useless = [{**GOOD, "chosen": " "}, {**GOOD, "rejected": "b"}, {**GOOD, "chosen": "", "rejected": "x"}]
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, GOOD, GOOD, *useless])
    with pytest.warns(UserWarning, match="left out") as caught:
        assert len(loaded(tiny_model_dir, path).preference_rows("train")) == 3
    empty, equal = (str(warning.message) for warning in caught)
    assert empty.startswith(f"data.preferences: left out 2 of 6 rows (an empty response); the first: {path}, line 4: ")
    assert equal.startswith(
        f"data.preferences: left out 1 of 6 rows (two equal responses); the first: {path}, line 5: "
    )


def test_rows_of_no_use_are_no_rule(tiny_model_dir, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, {**GOOD, "chosen": ""}, {**GOOD, "rejected": "b"}])
    with pytest.raises(ValueError, match=r"more than half of 3 rows .* got 1 .an empty.*, 1 .two equal.*data.skip_inv"):
        loaded(tiny_model_dir, path).prepare_data()
    with pytest.warns(UserWarning, match="left out 1 of 3"):
        assert len(loaded(tiny_model_dir, path, skip_invalid=True).preference_rows("train")) == 1
    bad = write_jsonl(tmp_path / "bad.jsonl", [{**GOOD, "chosen": ""}])
    for skip in (False, True):
        with pytest.raises(ValueError, match="expected at least one valid row, got none of 1"):
            loaded(tiny_model_dir, bad, skip_invalid=skip).prepare_data()


def test_prompts_of_pairs_come_once_and_prompts_of_their_own_as_often_as_given(tiny_model_dir, tmp_path):
    pairs = [{"prompt": p, "chosen": "b", "rejected": r} for p in "aab" for r in "cd"]
    path = write_jsonl(tmp_path / "x.jsonl", pairs)
    for options, expected in (({"preferences": path}, ["a", "b"]), ({"prompts": path}, list("aaaabb"))):
        data = PromptDataModule(tiny_model_dir, **options, validation_fraction=0.0)
        assert [row["prompt"] for row in data.prompt_rows("train")] == expected


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batches_of_one(world):
    sizes = [(i * 37) % 101 + 5 for i in range(98)]
    shares = [list(LengthSampler(sizes, 4 * world, 1, world, rank)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    one = list(LengthSampler(sizes, 4 * world, 1))
    for step in range(-(-98 // (4 * world))):
        # The last one too: of 98 rows three processes get 99, one of which stands in.
        together = sorted(i for share in shares for i in share[4 * step : 4 * step + 4] if i < 98)
        assert together == sorted(one[4 * world * step : 4 * world * (step + 1)])


@pytest.mark.parametrize(("size", "world"), [(9, 2), (10, 4), (1, 4)])
def test_rows_stand_in_where_they_do_not_come_out_even(size, world):
    shares = [list(EpochSampler(size, 4, 1, world, rank)) for rank in range(world)]
    assert {len(share) for share in shares} == {-(-size // world)}
    dealt = [i for share in shares for i in share]
    assert sorted(i for i in dealt if i < size) == list(range(size))
    assert all(size <= i < 2 * size for i in dealt if i not in range(size))
    # Where incomplete batches are left out, such rows are as well: as many batches as one process has.
    left = [list(EpochSampler(size, 4, 1, world, rank, drop_last=True)) for rank in range(world)]
    assert {len(share) for share in left} == {size // world}
    assert len({i for share in left for i in share}) == size // world * world


def test_a_row_that_stands_in_does_not_count(tiny_model_dir, tmp_path):
    data = loaded(tiny_model_dir, tiny_preferences(tmp_path / "x.jsonl", 5))
    rows = data.preference_rows("train")
    dealt = [DealtRows(rows)[i] for i in (1, 6, 4)]
    assert dealt == [rows[1], {**rows[1], "counts": False}, rows[4]]
    one, two = torch.arange(5.0)[:, None], -torch.arange(5.0)[:, None]
    features = FeatureRows(one, two, pair_labels(rows)).__getitems__([1, 6, 4])
    assert (features.chosen.tolist(), features.rejected.tolist()) == ([[1.0], [1.0], [4.0]], [[-1.0], [-1.0], [-4.0]])
    for found in (features.labels, data.collator.preferences(dealt).labels, data.collator.sft(dealt)):
        assert found.counts.tolist() == [True, False, True]
        assert found.example_ids.tolist() == [rows[i]["example_id"] for i in (1, 1, 4)]


class ShareTrainer(Trainer):
    """Stands for the second of two processes."""

    @property
    def distributed_sampler_kwargs(self):
        return {"num_replicas": 2, "rank": 1}


def test_lightning_leaves_the_sampler_alone(tiny_model_dir, tmp_path):
    data = PreferenceDataModule(tiny_model_dir, tiny_preferences(tmp_path / "x.jsonl", 40), batch_size=4)
    data.trainer = ShareTrainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    sampler = data.train_dataloader().sampler
    # Lightning wraps, and shuffles again, whatever is no DistributedSampler.
    assert isinstance(sampler, DistributedSampler)
    assert (sampler.num_replicas, sampler.rank, sampler.batch_size) == (2, 1, 8)
    assert len(sampler) == -(-len(data.preference_rows("train")) // 2)


def test_features_of_different_width_are_refused(tiny_model_dir, tmp_path):
    options = {"preferences": tiny_preferences(tmp_path / "x.jsonl", 6), "validation_fraction": 0.0}
    data = PreferenceDataModule(tiny_model_dir, **options)
    with pytest.raises(ValueError, match=r"expected features of one shape, got \(6, 3\), \(6, 4\)"):
        data.use_features("train", torch.ones(6, 3), torch.ones(6, 4))
