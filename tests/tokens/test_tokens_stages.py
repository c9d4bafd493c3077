"""Tokens in the stages: ends of responses in data, ids that need embeddings, padding that needs none."""

import json

import pytest
from helpers import tiny_model, tiny_tokenizer, write_jsonl
from tokenizers import AddedToken

from lit_vapo.cli import main
from lit_vapo.data.datamodule import PreferenceDataModule, PromptDataModule

TURNS = (
    "<bos>{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


def said(answer):
    return [{"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Conversations to prefer one answer in."""
    rows = [
        {"prompt": [{"role": "user", "content": f"Film {i}?"}], "chosen": said("good"), "rejected": said("bad")}
        for i in range(12)
    ]
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows)


def test_trained_responses_end_where_the_policy_stops(tmp_path, chats):
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.add_tokens([AddedToken("<turn>", special=True), AddedToken("<end_of_turn>", special=True)])
    tokenizer.chat_template = TURNS
    model = tiny_model(tmp_path, tokenizer)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert end not in tokenizer.all_special_ids
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [tokenizer.eos_token_id, end]}))
    data = PreferenceDataModule(model, preferences=chats, validation_fraction=0.0)
    for row in data.preference_rows("train"):
        for side in ("chosen_ids", "rejected_ids"):
            response = row[side][row["prompt_length"] :]
            assert (response[-1], response.count(end)) == (end, 1)
    (tab,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    told = PreferenceDataModule(model, preferences=chats, validation_fraction=0.0, stop_token_ids=[tab])
    assert told.encoder.stops == tuple(sorted([tokenizer.eos_token_id, end, tab]))


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A model whose tokenizer has one token more than it has embeddings for, which pads."""
    path = tmp_path_factory.mktemp("padded") / "model"
    tokenizer = tiny_tokenizer(path, chat_template=True, pad=False)
    model = tiny_model(path, tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(path)
    return model


def test_padding_needs_no_embedding(padded, tmp_path, stage_args):
    options = {"model__base__path": padded, "data__tokenizer": padded, "trainer__max_steps": 1}
    main(stage_args("sft", "fit", tmp_path / "sft", **options))
    main(stage_args("reward", "fit", tmp_path / "reward", **options))


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_tokens_without_an_embedding_are_named_before_training(
    stage, tmp_path, stage_args, untrained, tiny_ensemble_dir
):
    tokenizer = tiny_tokenizer(tmp_path / "model", chat_template=True)
    model = tiny_model(tmp_path / "model", tokenizer)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"a film {i}", "chosen": " good", "rejected": " bad"} for i in range(8)]
    rows[5]["prompt"] += " <tool>"
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = {"model__reward": tiny_ensemble_dir} if stage == "ppo" else {}
    data = {"data__preferences": file, "data__prompts": file, "data__tokenizer": model, "model__base__path": model}
    with pytest.raises((ValueError, SystemExit)) as caught:
        main(stage_args(stage, "fit", tmp_path / stage, **data, **options))
    message = str(caught.value)
    assert "data.tokenizer: expected token ids below" in message
    assert "'<tool>'" in message
    assert "rows.jsonl, line 6" in message


def test_a_stream_needs_an_embedding_for_every_token_but_padding(padded, chats):
    data = PreferenceDataModule(padded, preferences=chats, validation_fraction=0.0, streaming=True)
    vocabulary = data.text_tokenizer.get_vocab()
    assert data.text_tokenizer.pad_token_id == max(vocabulary.values())
    assert data.largest_token() == (max(vocabulary.values()) - 1, "the vocabulary, for data streams")
    held = PromptDataModule(padded, prompts=chats, validation_fraction=0.0)
    assert held.largest_token() == (-1, "no row")
    rows = held.prompt_rows("train")
    assert held.largest_token()[0] == max(max(row["prompt_ids"]) for row in rows)
