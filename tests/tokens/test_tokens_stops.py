"""Which tokens stop a model: the same for its data and its rollouts, and found without its weights."""

import json

import pytest
from helpers import tiny_model, tiny_tokenizer
from tokenizers import AddedToken

from lit_vapo.data.stopping import find_stops
from lit_vapo.models.generation import Sampling, stop_ids
from lit_vapo.models.pretrained import Pretrained, load_causal_lm, model_config
from lit_vapo.models.vocabulary import check_embeddings
from lit_vapo.stops import end_of_response, stop_tokens


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def model(tmp_path):
    """A model whose turns end with a token that no tokenizer setting names."""
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.add_tokens(AddedToken("<end_of_turn>", special=True))
    tiny_model(tmp_path, tokenizer)
    return tmp_path, tokenizer


def test_a_response_ends_with_the_first_of_several():
    assert end_of_response([5, 7, 2, 7], (2, 7)) == 2
    assert end_of_response([5, 7, 2, 7], (2, 7), start=2) == 3
    assert end_of_response([5], (2, 7)) is end_of_response([], (2,)) is end_of_response([2], ()) is None
    assert stop_tokens(2, [7, 2], None, (), [None, 5]) == (2, 5, 7)


@pytest.mark.parametrize(
    ("generation", "config", "more"),
    [(None, 0, []), ([0, 313], 0, []), (313, [0, 1], [2]), (None, None, None), (0, [313], [5, 5])],
)
def test_data_and_rollouts_find_the_same(model, generation, config, more):
    folder, tokenizer = model
    change(folder / "config.json", eos_token_id=config)
    change(folder / "generation_config.json", eos_token_id=generation)
    found = find_stops(str(folder), tokenizer, more)
    lm = load_causal_lm(Pretrained(str(folder)))
    assert list(found) == stop_ids(lm, Sampling(stop_token_ids=more), tokenizer.eos_token_id)
    expected = set()
    for value in (generation, config, more, tokenizer.eos_token_id):
        expected |= set(value) if isinstance(value, list) else {value} - {None}
    assert set(found) == expected


def test_a_tokenizer_without_a_model_stops_at_its_own_end(tmp_path):
    assert find_stops(str(tmp_path), tiny_tokenizer(tmp_path)) == (0,)
    assert find_stops("nobody/nothing", tiny_tokenizer(tmp_path)) == (0,)


def test_the_text_model_inside_another_is_heard(model):
    folder, tokenizer = model
    change(folder / "config.json", text_config={"eos_token_id": [313]})
    assert find_stops(str(folder), tokenizer) == (0, 313)


@pytest.mark.parametrize("value", ["</s>", [0, "x"], -1, [True], {}])
def test_a_configuration_that_names_no_tokens_is_refused(model, value):
    folder, tokenizer = model
    change(folder / "generation_config.json", eos_token_id=value)
    with pytest.raises(
        ValueError, match="generation_config.json: expected a token id or a list of them in 'eos_token_id'"
    ):
        find_stops(str(folder), tokenizer)


def test_a_torn_configuration_is_refused(model):
    folder, tokenizer = model
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: expected a JSON object, got malformed JSON"):
        find_stops(str(folder), tokenizer)


@pytest.mark.parametrize("wrong", [-1, 314, 10**9])
def test_stop_tokens_that_are_none_are_refused_by_their_option(model, wrong):
    folder, tokenizer = model
    with pytest.raises(ValueError, match=rf"data.stop_token_ids: expected token ids 0 … 313 .*got \[{wrong}\]"):
        find_stops(str(folder), tokenizer, [3, wrong])
    with pytest.raises(ValueError, match=rf"sampling.stop_token_ids: expected token ids 0 … 313 .*got \[{wrong}\]"):
        stop_ids(load_causal_lm(Pretrained(str(folder))), Sampling(stop_token_ids=[3, wrong]), 0)


def test_a_token_without_an_embedding_stops_nothing(model):
    folder, _ = model
    assert stop_ids(load_causal_lm(Pretrained(str(folder))), Sampling(), 314) == [0]


def test_tokens_beyond_the_embeddings_are_refused(model):
    folder, tokenizer = model
    config = model_config(Pretrained(str(folder)))
    check_embeddings(config, tokenizer, 313, "line 1")
    message = r"data.tokenizer: expected token ids below 314, for which model.base \(.*\) has .*, got 314 .* in line 1"
    with pytest.raises(ValueError, match=message):
        check_embeddings(config, tokenizer, 314, "line 1")
