"""The datamodules: the same rows on every path, honest loaders, features in the right order."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import CONFIGS, tiny_tokenizer, write_jsonl

from lit_vapo.data.collate import PreferenceBatch, PromptBatch, SFTBatch
from lit_vapo.data.datamodule import PreferenceDataModule, PromptDataModule, SFTDataModule
from lit_vapo.types import FeaturePairs

KINDS = [PreferenceDataModule, PromptDataModule, SFTDataModule]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tokenizer that pads with the end of sequence, and pairs of several lengths with margins."""
    folder = tmp_path_factory.mktemp("datamodule")
    tiny_tokenizer(folder / "tokenizer", pad=False)
    pairs = [
        {"prompt": f"Review {i}:" + " film" * (i % 5), "chosen": " good" * (1 + i % 3), "rejected": " bad", "margin": i}
        for i in range(40)
    ]
    return SimpleNamespace(
        folder=folder,
        tokenizer=str(folder / "tokenizer"),
        pairs=write_jsonl(folder / "pairs.jsonl", pairs),
        few=write_jsonl(folder / "few.jsonl", pairs[:5]),
        prompts=write_jsonl(folder / "prompts.jsonl", [{"prompt": f"Film {i}:"} for i in range(12)]),
    )


def make(kind, files, **replaced):
    given = {
        "tokenizer": files.tokenizer,
        "preferences": files.pairs,
        "validation_fraction": 0.25,
        "batch_size": 4,
        "max_length": 64,
        "max_prompt_length": 48,
        **replaced,
    }
    return kind(**given)


def served(loader):
    return [i for batch in loader for i in batch.labels.example_ids.tolist()]


def test_one_yaml_serves_every_stage(files, tmp_path):
    options = yaml.safe_load((CONFIGS / "data" / "sentiment.yaml").read_text())
    options.update(tokenizer=files.tokenizer, preferences=files.pairs)
    options.update({f"prompts{part}": files.prompts for part in ("", "_validation", "_test")})
    batches = [next(iter(kind(**{**options, "batch_size": 4}).train_dataloader())) for kind in KINDS]
    assert [type(batch) for batch in batches] == [PreferenceBatch, PromptBatch, SFTBatch]


def test_an_epoch_serves_every_pair_once_and_the_next_in_another_order(files):
    data = make(PreferenceDataModule, files)
    expected = [r["example_id"] for r in data.preference_rows("train")]
    loader = data.train_dataloader()
    first, second = served(loader), served(loader)
    assert sorted(first) == sorted(second) == sorted(expected)
    assert first != second
    assert served(make(PreferenceDataModule, files).train_dataloader()) == first
    assert served(make(PreferenceDataModule, files, seed=1).train_dataloader()) != first


def test_held_out_pairs_keep_their_order(files):
    data = make(PreferenceDataModule, files)
    expected = [r["example_id"] for r in data.preference_rows("val")]
    assert served(data.val_dataloader()) == served(data.val_dataloader()) == expected
    assert served(data.test_dataloader()["test"]) == expected


def test_lengths_are_right_where_padding_is_the_end_of_sequence(files):
    data = make(PreferenceDataModule, files)
    end = data.text_tokenizer.eos_token_id
    assert end == 0  # what pads
    by_id = {r["example_id"]: r for r in data.preference_rows("train")}
    for batch in data.train_dataloader():
        for ids, size, identity in zip(batch.chosen_ids, batch.chosen_lengths, batch.labels.example_ids, strict=True):
            assert ids[:size].tolist() == by_id[int(identity)]["chosen_ids"]
            assert ids[size - 1] == end  # the response's own
            assert (ids[size:] == end).all()


def test_prompts_of_ppo_are_held_out_as_their_pairs_are(files):
    pairs = make(PreferenceDataModule, files)
    prompts = make(PromptDataModule, files)
    for split in ("train", "val"):
        assert [r["prompt"] for r in prompts.prompt_rows(split)] == [r["prompt"] for r in pairs.preference_rows(split)]
        for prompt, pair in zip(prompts.prompt_rows(split), pairs.preference_rows(split), strict=True):
            assert pair["chosen_ids"][: pair["prompt_length"]] == prompt["prompt_ids"]


def test_files_of_their_own_for_validation_and_test(files):
    data = make(PreferenceDataModule, files, preferences_validation=files.few)
    assert [len(data.preference_rows(s)) for s in ("train", "val", "test")] == [40, 5, 5]
    data = make(PromptDataModule, files, prompts=files.prompts, prompts_test=files.few)
    assert len(data.prompt_rows("test")) == 5
    assert sum(len(data.prompt_rows(s)) for s in ("train", "val")) == 12
    assert [len(b.prompts) for b in data.predict_dataloader()] == [4, 1]


@pytest.mark.parametrize("fractions", [(0.0, 0.0), (0.3, 0.0), (0.3, 0.3)])
def test_all_prompts_given_are_answered(files, fractions):
    shares = dict(zip(("validation_fraction", "test_fraction"), fractions, strict=True))
    data = make(PromptDataModule, files, prompts=files.prompts, **shares)
    every = make(PromptDataModule, files, prompts=files.prompts, validation_fraction=0).prompt_rows("train")
    answered = [prompt for batch in data.predict_dataloader() for prompt in batch.prompts]
    assert sorted(answered) == sorted(row["prompt"] for row in every)
    # Those of another file are for validation alone.
    data = make(PromptDataModule, files, prompts=files.prompts, prompts_validation=files.few)
    answered = [prompt for batch in data.predict_dataloader() for prompt in batch.prompts]
    assert sorted(answered) == sorted(row["prompt"] for row in every)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_set_aside_validates_on_nothing(files, kind):
    data = make(kind, files, validation_fraction=0.0)
    assert list(data.val_dataloader()) == list(data.test_dataloader()) == []
    assert list(data.train_dataloader())


def test_features_keep_identities_and_margins(files):
    data = make(PreferenceDataModule, files)
    pairs = data.preferences("train")
    # Features that tell where they come from: the sum of a response's tokens.
    sums = [torch.tensor([[float(sum(s.ids))] for s in side]) for side in pairs]
    data.use_features("train", *sums)
    rows = {r["example_id"]: r for r in data.preference_rows("train")}
    seen = []
    for batch in data.train_dataloader():
        assert isinstance(batch, FeaturePairs)
        for k, identity in enumerate(batch.labels.example_ids.tolist()):
            assert batch.chosen[k].item() == sum(rows[identity]["chosen_ids"])
            assert batch.rejected[k].item() == sum(rows[identity]["rejected_ids"])
            assert batch.labels.margin[k].item() == rows[identity]["margin"]
            seen.append(identity)
    assert sorted(seen) == sorted(rows)
    # The other splits stay tokens until they have features too.
    assert isinstance(next(iter(data.val_dataloader())), PreferenceBatch)


@pytest.mark.parametrize(("chosen", "rejected"), [(3, 3), (3, None), (None, 3)])
def test_features_of_another_number_of_pairs_are_refused(files, chosen, rejected):
    data = make(PreferenceDataModule, files)
    size = len(data.preference_rows("val"))
    features = [torch.zeros(n or size, 2) for n in (chosen, rejected)]
    with pytest.raises(ValueError, match=f"expected features of {size} pairs, got {len(features[0])} and"):
        data.use_features("val", *features)


def test_the_margin_column_reaches_the_batch(files):
    data = make(PreferenceDataModule, files, validation_fraction=0.0)
    margins = {}
    for batch in data.train_dataloader():
        margins.update(zip(batch.labels.example_ids.tolist(), batch.labels.margin.tolist(), strict=True))
    assert [margins[r["example_id"]] for r in data.preference_rows("train")] == list(range(40))


def test_truncation_is_counted_and_reported_once(files):
    data = make(PreferenceDataModule, files, max_length=4)
    # " good" is one token: with the end of sequence responses have 2, 3, 4, 2, … tokens. Beside one prompt token there
    # is room for 3, so every third of the 40 is cut: 13.
    assert len(data.text_tokenizer(" good")["input_ids"]) == 1
    message = r"data.preferences: data.max_length = 4 cut the beginning off 40 prompts and the end off 13 responses"
    with pytest.warns(UserWarning, match=message):
        data.prepare_data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.train_dataloader()
        data.preferences("val")


def test_responses_that_truncation_makes_equal_are_refused(files, tmp_path):
    equal = write_jsonl(tmp_path / "equal.jsonl", [{"prompt": "p", "chosen": "aaaab", "rejected": "aaaac"}])
    data = make(PreferenceDataModule, files, preferences=equal, max_length=4)
    with pytest.raises(ValueError, match=r"equal.jsonl, line 1: expected two responses that differ within data.max_l"):
        data.prepare_data()


def test_a_batch_takes_no_more_prompts_than_each_process_has(files, tmp_path):
    ten = write_jsonl(tmp_path / "ten.jsonl", [{"prompt": f"Film {i}:"} for i in range(10)])
    data = make(PromptDataModule, files, prompts=ten, validation_fraction=0.0, batch_size=11)
    with pytest.raises(ValueError, match="data.batch_size: expected at most the 10 prompts there are, got 11"):
        data.train_dataloader()
    data.batch_size = 6
    assert [len(b.prompts) for b in data.train_dataloader()] == [6]  # the incomplete one is left out
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": 0})
    with pytest.raises(ValueError, match="at most the 5 prompts there are for each of 2 processes, of 10, got 6"):
        data.train_dataloader()


def test_nothing_left_to_train_on_is_an_error(files, tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "only"}])
    data = make(PromptDataModule, files, prompts=one, validation_fraction=0.999999)
    with pytest.raises(ValueError, match="data.prompts: expected rows to train on, got none outside the validation"):
        data.prepare_data()


@pytest.mark.parametrize("kind", KINDS)
def test_missing_preferences_are_named_by_their_key(files, kind):
    key = "prompts" if kind is PromptDataModule else "preferences"
    with pytest.raises(ValueError, match=f"data.{key}: expected files or hub names, got null"):
        make(kind, files, preferences=None).prepare_data()


def test_bad_rows_of_a_validation_file_are_named_before_training(files, tmp_path):
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "p", "chosen": "a"}])
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: expected column 'rejected'"):
        make(PreferenceDataModule, files, preferences_validation=bad).prepare_data()


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_the_validation_fraction_is_a_fraction(files, fraction):
    with pytest.raises(
        ValueError, match=f"data.validation_fraction: expected a number from 0 to below 1, got {fraction}"
    ):
        make(PreferenceDataModule, files, validation_fraction=fraction)


def test_all_datamodules_take_the_same_options():
    signatures = [copy.copy(kind.__init__) for kind in KINDS]
    assert len(set(signatures)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "data.batch_size: expected at least 1, got 0"),
        ({"max_prompt_length": 0}, "data.max_prompt_length: expected at least 1, got 0"),
        ({"max_length": 1}, "data.max_length: expected at least 2, got 1"),
    ],
)
def test_bad_options_are_named(files, changes, message):
    with pytest.raises(ValueError, match=message):
        make(PromptDataModule, files, **changes)


def test_a_prompt_that_is_too_long_is_named(files):
    with pytest.raises(ValueError, match=r"pairs.jsonl, line 1: expected a prompt of 1 … 2 tokens"):
        make(PromptDataModule, files, max_prompt_length=2).prepare_data()


def test_prompt_batches_stop_at_the_count(files):
    data = make(PromptDataModule, files)
    batches = data.prompt_batches("train", 6)
    assert [len(b.prompts) for b in batches] == [4, 2]
    assert [p for b in batches for p in b.prompts] == [r["prompt"] for r in data.prompt_rows("train")[:6]]
    assert sum(len(b.prompts) for b in data.prompt_batches("train", 1000)) == len(data.prompt_rows("train"))
