import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples.sentiment import prepare as prepare_module
from examples.sentiment.corpus import Review
from examples.sentiment.judge import PREFIX
from examples.sentiment.prepare import convert_model, examine_judge, once, write_preferences, write_prompts


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_preferences_put_the_positive_text_above_the_negative(tmp_path):
    reviews = [Review(text, text.startswith("good"), "s") for text in ("good 1", "bad 1", "bad 2", "good 2", "good 3")]

    count = write_preferences(reviews, tmp_path / "p.jsonl", 10)

    assert count == 2  # the third positive text finds no partner
    assert read(tmp_path / "p.jsonl") == [
        {"prompt": PREFIX, "chosen": " good 1", "rejected": " bad 1"},
        {"prompt": PREFIX, "chosen": " good 2", "rejected": " bad 2"},
    ]
    assert write_preferences(reviews, tmp_path / "p.jsonl", 1) == 1


def test_prompts_are_distinct_openings_in_three_files(tmp_path):
    # Ten words each; 330 distinct openings, then ten repeated ones and a text too short to leave anything to say.
    texts = [f"{i} b c d e f g h i j" for i in range(330)] + [f"{i} b c d e other words h i j" for i in range(10)]
    reviews = [Review(text, True, "s") for text in [*texts, "too short a text"]]

    write_prompts(reviews, tmp_path)

    files = {
        name: [row["prompt"] for row in read(tmp_path / f"prompts_{name}.jsonl")] for name in ("test", "val", "train")
    }
    assert {name: len(rows) for name, rows in files.items()} == {"test": 256, "val": 64, "train": 330 - 256 - 64}
    assert len({prompt for rows in files.values() for prompt in rows}) == 330
    assert files["test"][0] == f"{PREFIX} 0 b c d e"


def test_the_judges_quality_by_hand():
    # p = 0.9, 0.2, 0.6 for a positive and two negative texts: two right of three.
    # NLL = -(ln 0.9 + ln 0.8 + ln 0.4) / 3. Confidences 0.9, 0.8, 0.6 stand in bins of their own, so
    # ECE = (|1 - 0.9| + |1 - 0.8| + |0 - 0.6|) / 3 = 0.3.
    judge = SimpleNamespace(probabilities=lambda texts: np.array([0.9, 0.2, 0.6]))
    reviews = [Review("x", True, "s"), Review("y", False, "s"), Review("z", False, "s")]

    quality = examine_judge(judge, reviews)

    nll = -(math.log(0.9) + math.log(0.8) + math.log(0.4)) / 3
    assert quality == pytest.approx({"accuracy": 2 / 3, "nll": nll, "ece": 0.3, "sentences": 3})


def test_what_is_there_is_kept(tmp_path, capsys):
    made = []

    def make(folder):
        folder.mkdir()
        made.append(folder)

    once(tmp_path / "thing", "thing", make)
    once(tmp_path / "thing", "thing", make)

    assert len(made) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
    assert "is there" in capsys.readouterr().out


def test_half_a_folder_never_bears_the_name(tmp_path):
    def fail(folder):
        folder.mkdir()
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        once(tmp_path / "thing", "thing", fail)

    assert not (tmp_path / "thing").exists()


def test_the_converted_model_is_an_ordinary_folder(tmp_path, monkeypatch, tiny_model_dir):
    # The stub stands for the model read from GGUF: its configuration says that it is quantised.
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    loaded = LlamaForCausalLM(LlamaConfig(**sizes, **ids, vocab_size=len(tokenizer), tie_word_embeddings=True))
    loaded.to(torch.bfloat16)
    loaded.config.quantization_config = {"quant_method": "gguf"}
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "package_folder", lambda name, install: tmp_path)
        for name, stub in (("AutoModelForCausalLM", loaded), ("AutoTokenizer", tokenizer)):
            patch.setattr(prepare_module, name, SimpleNamespace(from_pretrained=lambda *_, stub=stub, **__: stub))
        convert_model(tmp_path / "model")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    for name, value in loaded.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert saved.pad_token == "<|endoftext|>"
    assert saved.pad_token_id != saved.eos_token_id
