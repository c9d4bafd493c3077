"""Sources, formats, tokens, batches, splits and the datamodules."""

import random
import re

import datasets
import pytest
import torch
from helpers import tiny_tokenizer, write_jsonl

from lit_vapo.data.collate import Collator, FeatureBatch, pad
from lit_vapo.data.datamodule import PreferenceDataModule, PromptDataModule, SFTDataModule
from lit_vapo.data.formats import read_preference, read_prompt, shared_prompt
from lit_vapo.data.sampler import LengthSampler
from lit_vapo.data.sources import Row, load_rows
from lit_vapo.data.splits import set_aside
from lit_vapo.data.tokenise import load_text_tokenizer, stable_id, tokenise_preference, tokenise_prompt

HH = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: again?\n\nAssistant:"
USER = {"role": "user", "content": "Name a prime."}


def answer(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=True)


def row(**values):
    return Row(values, "pairs.jsonl, line 3")


# Sources


def test_jsonl_parquet_globs_and_lists_agree(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    first = write_jsonl(tmp_path / "one.jsonl", rows[:2])
    second = write_jsonl(tmp_path / "two.jsonl", rows[2:])
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "all.parquet")
    for source in ([first, second], str(tmp_path / "*.jsonl"), str(tmp_path / "all.parquet")):
        assert [dict(r.values) for r in load_rows(source, "data.preferences")] == rows
    assert load_rows([first, second], "k")[2].place == f"{second}, line 1"


def test_hub_names_go_to_datasets(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"prompt": "p"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("org/set:part", "data.prompts")[0].place == "org/set:part (train), row 1"
    assert asked == [("org/set", "part", "train")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', "a.jsonl, line 2: expected a JSON object, got malformed JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: expected a JSON object, got list"),
        ("a.jsonl", "\n", "data.prompts: expected at least one row, got none"),
        ("a.csv", "x", r"data.prompts: expected a .jsonl, .json or .parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name), "data.prompts")


def test_a_missing_file_is_not_taken_for_a_hub_name():
    with pytest.raises(ValueError, match=r"expected a file, got 'gone.jsonl', which does not exist"):
        load_rows("gone.jsonl", "data.prompts")


# Formats


def test_explicit_prompt(tokenizer):
    found = read_preference(row(prompt="p", chosen=" a", rejected=" b", margin=2), tokenizer)
    assert found == ("p", " a", " b", 2.0, False)


def test_implicit_prompt_ends_at_the_last_common_turn(tokenizer):
    found = read_preference(row(chosen=HH + " yes, hello", rejected=HH + " yes, go away"), tokenizer)
    assert found[:3] == (HH, " yes, hello", " yes, go away")
    assert read_prompt(row(chosen=HH + " a", rejected=HH + " b"), tokenizer).prompt == HH


def test_implicit_prompt_without_turns_does_not_tear_words():
    assert shared_prompt("the film was good", "the film was great") == "the film was"
    assert shared_prompt("good", "great") == ""


def test_conversation_with_and_without_a_prompt_column(tokenizer):
    explicit = read_preference(row(prompt=[USER], chosen=answer("7"), rejected=answer("9")), tokenizer)
    implicit = read_preference(row(chosen=[USER, *answer("7")], rejected=[USER, *answer("9")]), tokenizer)
    assert explicit == implicit
    assert explicit[:3] == ("<bos>user:Name a prime.<eos><bos>assistant:", "7<eos>", "9<eos>")
    assert read_prompt(row(prompt=[USER]), tokenizer).prompt == explicit.prompt


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chosen": "a"}, "line 3: expected column 'rejected', got columns ['chosen']"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "expected text or messages in column 'chosen', got int"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "expected text or messages in column 'prompt', got int"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "expected a response in column 'chosen', got an empty one"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "expected two different responses"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "x"}, "expected a number in column 'margin'"),
        ({"prompt": [USER], "chosen": [{"x": 1}], "rejected": answer("9")}, "expected a list of messages"),
        ({"prompt": [USER], "chosen": answer(""), "rejected": answer("9")}, "got an empty one"),
    ],
)
def test_bad_preferences_are_named(tokenizer, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_preference(row(**values), tokenizer)


def test_bad_prompts_are_named(tokenizer):
    with pytest.raises(ValueError, match="line 3: expected a prompt in column 'prompt', got an empty one"):
        read_prompt(row(prompt=""), tokenizer)
    with pytest.raises(ValueError, match="line 3: expected column 'prompt'"):
        read_prompt(row(text="x"), tokenizer)


# Tokens


@pytest.mark.parametrize("templated", [False, True])
def test_every_stage_sees_the_same_prompt_tokens(tokenizer, templated):
    values = (
        {"prompt": [USER], "chosen": answer("good"), "rejected": answer("bad")}
        if templated
        else {"prompt": "the film", "chosen": " good", "rejected": " bad"}
    )
    pair, _ = tokenise_preference(read_preference(row(**values), tokenizer), tokenizer, 100, append_eos=True)
    prompt = tokenise_prompt(read_prompt(row(**values), tokenizer), tokenizer, 100, "here")
    size = pair["prompt_length"]
    assert pair["chosen_ids"][:size] == pair["rejected_ids"][:size] == prompt["prompt_ids"]
    assert pair["chosen_ids"][-1] == pair["rejected_ids"][-1] == tokenizer.eos_token_id
    assert pair["chosen_ids"].count(tokenizer.eos_token_id) == (2 if templated else 1)


def test_truncation_keeps_the_response(tokenizer):
    preference = read_preference(row(prompt="the film was good " * 5, chosen=" good", rejected=" bad bad"), tokenizer)
    whole, nothing = tokenise_preference(preference, tokenizer, 1000, append_eos=True)
    response = whole["chosen_ids"][whole["prompt_length"] :]
    longest = len(whole["rejected_ids"]) - whole["prompt_length"]
    cut, counted = tokenise_preference(preference, tokenizer, longest + 4, append_eos=True)
    assert nothing == (0, 0)
    assert counted == (1, 0)
    assert cut["prompt_length"] == 4
    assert cut["chosen_ids"][4:] == response
    assert cut["chosen_ids"][:4] == whole["chosen_ids"][: whole["prompt_length"]][-4:]
    tight, counted = tokenise_preference(preference, tokenizer, 2, append_eos=True)
    assert counted.responses == 2
    assert tight["prompt_length"] == 1
    assert len(tight["chosen_ids"]) == len(tight["rejected_ids"]) == 2


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    tiny_tokenizer(tmp_path / "no-pad", pad=False)
    tokenizer = load_text_tokenizer(str(tmp_path / "no-pad"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_identity_depends_on_the_texts_alone():
    assert stable_id("a", "b") == stable_id("a", "b")
    assert stable_id("a", "b") != stable_id("ab")
    assert 0 <= stable_id("x") < 2**63


# Batches


def test_padding_on_either_side():
    right, lengths = pad([[1, 2, 3], [4]], 9)
    assert right.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert lengths.tolist() == [3, 1]
    assert pad([[1, 2, 3], [4]], 9, left=True)[0].tolist() == [[1, 2, 3], [9, 9, 4]]


def test_lengths_count_a_padding_token_that_is_a_real_token():
    # Padding with the end of sequence: lengths, not ids, say where a row ends.
    batch = Collator(7).prompts(
        [{"prompt_ids": [7, 5, 7], "prompt": "a", "example_id": 1}, {"prompt_ids": [5], "prompt": "b", "example_id": 2}]
    )
    assert batch.lengths.tolist() == [3, 1]
    assert batch.input_ids.tolist() == [[7, 5, 7], [7, 7, 5]]
    assert batch.prompts == ["a", "b"]


def test_sampler_yields_every_row_once_and_reduces_padding():
    lengths = [random.Random(0).randrange(5, 200) for _ in range(1003)]
    random.Random(1).shuffle(lengths)
    sampler = LengthSampler(lengths, 8, seed=3)
    first = list(sampler)
    second = list(sampler)
    sampler.set_epoch(0)
    assert sorted(first) == list(range(1003))
    assert first != second
    assert list(sampler) == first
    assert len(sampler) == 1003

    lengths = [random.Random(i).randrange(5, 200) for i in range(1000)]
    order = list(LengthSampler(lengths, 8))

    def padded(rows):
        return sum(8 * max(lengths[r] for r in rows[i : i + 8]) for i in range(0, 1000, 8))

    assert padded(order) < 1.1 * sum(lengths)
    assert padded(range(1000)) > 1.5 * sum(lengths)


# Splits


def test_a_rows_place_does_not_depend_on_the_others():
    rows = [{"prompt": f"p{i}", "example_id": stable_id(str(i))} for i in range(1000)]
    train, held = set_aside(rows, 0.2)
    assert 150 < len(held) < 250
    assert {r["prompt"] for r in train}.isdisjoint(r["prompt"] for r in held)
    again = set_aside(rows[::-1][:500], 0.2)[1]
    assert {r["prompt"] for r in again} <= {r["prompt"] for r in held}


def test_pairs_of_one_prompt_stay_together_unless_all_share_it():
    rows = [{"prompt": f"p{i // 2}", "example_id": stable_id(str(i))} for i in range(1000)]
    train, held = set_aside(rows, 0.2)
    assert {r["prompt"] for r in train}.isdisjoint(r["prompt"] for r in held)
    same = [{"prompt": "Review:", "example_id": stable_id(str(i))} for i in range(1000)]
    assert 150 < len(set_aside(same, 0.2)[1]) < 250


# Datamodules


@pytest.fixture
def options(tiny_model_dir, tiny_preferences_file, tiny_prompts_file):
    return {
        "tokenizer": tiny_model_dir,
        "preferences": tiny_preferences_file,
        "prompts": tiny_prompts_file,
        "validation_fraction": 0.25,
        "batch_size": 4,
        "max_length": 64,
        "max_prompt_length": 48,
    }


@pytest.mark.parametrize("kind", [PreferenceDataModule, PromptDataModule, SFTDataModule])
def test_one_set_of_options_serves_every_stage(kind, options):
    module = kind(**options)
    module.prepare_data()
    batch = next(iter(module.train_dataloader()))
    assert len(batch[0]) == 4
    assert next(iter(module.val_dataloader())) is not None
    assert next(iter(module.test_dataloader())) is not None


def test_features_take_the_place_of_tokens_in_the_same_order(options):
    module = PreferenceDataModule(**options)
    pairs = module.preferences("val")
    chosen = torch.tensor([[float(sum(s.ids))] for s in pairs.chosen])
    rejected = torch.tensor([[float(sum(s.ids))] for s in pairs.rejected])
    tokens = next(iter(module.val_dataloader()))
    module.use_features("val", chosen, rejected)
    features = next(iter(module.val_dataloader()))
    assert isinstance(features, FeatureBatch)
    mask = torch.arange(tokens.chosen_ids.shape[1]) < tokens.chosen_lengths[:, None]
    torch.testing.assert_close(features.chosen[:, 0], torch.where(mask, tokens.chosen_ids, 0).sum(1).float())
    assert features.example_ids.tolist() == tokens.example_ids.tolist()
    with pytest.raises(ValueError, match="expected features of"):
        module.use_features("val", chosen[1:], rejected[1:])


def test_truncation_is_reported_once(options):
    module = PreferenceDataModule(**{**options, "max_length": 8})
    with pytest.warns(UserWarning, match=r"cut the beginning off \d+ prompts and the end off \d+ responses"):
        module.prepare_data()


def test_prompt_batches_stop_at_the_count(options):
    module = PromptDataModule(**options)
    batches = module.prompt_batches("train", 6)
    assert [len(b.prompts) for b in batches] == [4, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1000}, "data.batch_size: expected at most the"),
        ({"prompts": None, "preferences": None}, "data.prompts: expected files or hub names, got null"),
        ({"max_prompt_length": 2}, "line 1: expected a prompt of 1 … 2 tokens"),
        ({"batch_size": 0}, "data.batch_size: expected at least 1, got 0"),
        ({"max_length": 1}, "data.max_length: expected at least 2, got 1"),
    ],
)
def test_bad_options_are_named(options, changes, message):
    with pytest.raises(ValueError, match=message):
        PromptDataModule(**{**options, **changes}).train_dataloader()


def test_prompts_may_come_from_preferences(options):
    module = PromptDataModule(**{**options, "prompts": None})
    assert module.prompt_rows("train")[0]["prompt"].startswith("Review")
