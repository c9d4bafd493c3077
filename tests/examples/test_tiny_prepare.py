import json
from dataclasses import asdict

import pytest
import yaml
from helpers import CONFIGS

from examples.sentiment.corpus import Review, split_position
from examples.tiny.prepare import (
    MOST_LETTERS,
    MOST_WORDS,
    RESPONSE_TOKENS,
    TRAIN,
    halves,
    make_model,
    make_tokenizer,
    write_texts,
)
from lit_vapo.study.experiments.language import Training


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_texts_are_cut_into_opening_and_continuation():
    words = [f"w{i}" for i in range(40)]
    opening, rest = halves(Review(" ".join(words), True, "s"))
    assert (opening + rest).split() == words[:MOST_WORDS]
    assert (opening, rest[:4]) == ("w0 w1 w2", " w3 ")


def test_prompts_are_openings_of_texts_that_nobody_learns_from(tmp_path):
    reviews = [Review(f"{i} b c d e f g h", i % 3 == 0, "s") for i in range(60)]
    reviews += [Review(f"{'long' * 9} {i} c d e f g h", True, "s") for i in range(40)] + [
        Review("too short", True, "s")
    ]
    write_texts(reviews, tmp_path)
    texts, prompts = read(tmp_path / "texts.jsonl"), [row["prompt"] for row in read(tmp_path / "prompts.jsonl")]
    held = {r.text for r in reviews[:-1] if split_position(r.text) >= TRAIN}
    assert {row["prompt"] + row["chosen"] for row in texts} == {r.text for r in reviews[:-1]} - held
    assert set(prompts) == {" ".join(t.split()[:3]) for t in held if not t.startswith("long")}
    assert all(len(prompt) <= MOST_LETTERS for prompt in prompts)
    # The labels go along, and the order is a shuffle.
    label = {r.text: r.positive for r in reviews}
    assert all(row["positive"] == label[row["prompt"] + row["chosen"]] for row in texts)
    assert [row["prompt"] for row in texts] != sorted(row["prompt"] for row in texts)


def test_model_and_tokenizer_fit():
    tokenizer = make_tokenizer(["the film was good", "the plot was bad"], 300)
    model = make_model(tokenizer, width=16, layers=1, seed=0)
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (0, 1)
    assert tokenizer.decode(tokenizer("the film was bad")["input_ids"]) == "the film was bad"


@pytest.mark.parametrize("name", ["known_noise", "known_noise_corrupted", "known_noise_strength", "learned_ensemble"])
def test_studies_train_as_by_default_on_responses_as_long_as_the_references(name):
    shipped = yaml.safe_load((CONFIGS / "study" / f"{name}.yaml").read_text())["experiment"]["init_args"]["training"]
    default = asdict(Training())
    assert default["sampling"]["max_new_tokens"] == RESPONSE_TOKENS
    sampling = shipped.pop("sampling")
    assert sampling == {key: default["sampling"][key] for key in sampling}
    differ = {key for key in shipped if shipped[key] != default[key]}
    assert differ == ({"kl_coef"} if name == "learned_ensemble" else set())
