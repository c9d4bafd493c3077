"""Sampling: where responses end, and from which distribution they come."""

import copy
import math

import helpers
import pytest
import torch
from transformers import GenerationConfig

from lit_vapo.functional import token_logprobs
from lit_vapo.models.generation import Sampling, stop_ids
from lit_vapo.models.pretrained import Pretrained, load_causal_lm
from lit_vapo.models.transformers_generator import TransformersGenerator, _Draw


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """A tiny model whose padding is its end of sequence."""
    path = tmp_path_factory.mktemp("sampling")
    return load_causal_lm(Pretrained(helpers.tiny_model(path, helpers.tiny_tokenizer(path, pad=False))))


def draw(lm, ids, lengths, sampling, stops, seed=0):
    torch.manual_seed(seed)
    return TransformersGenerator()(lm, None, ids, lengths, sampling, stops)


def test_a_response_ends_at_its_first_stop_token(lm):
    stops = list(range(0, 320, 8))
    out = draw(lm, torch.zeros(64, 3, dtype=torch.long), torch.full((64,), 3), Sampling(8), stops)
    assert 0 < out.stopped.sum() < 64
    for ids, length, stopped in zip(out.response_ids.tolist(), out.response_lengths.tolist(), out.stopped, strict=True):
        ends = [t for t, token in enumerate(ids) if token in stops]
        assert bool(stopped) == bool(ends)
        assert length == (ends[0] + 1 if ends else 8)


def test_an_end_of_sequence_in_the_prompt_ends_nothing(lm):
    # The prompt is full of the stop token, which is also the padding.
    out = draw(lm, torch.zeros(32, 4, dtype=torch.long), torch.arange(32) % 4 + 1, Sampling(3), [0])
    assert out.response_lengths.min() >= 1
    assert (out.response_lengths == 3).sum() > 20


def test_without_stop_tokens_every_response_is_of_full_length(lm):
    out = draw(lm, torch.ones(8, 2, dtype=torch.long), torch.full((8,), 2), Sampling(5), [])
    assert out.response_lengths.tolist() == [5] * 8
    assert not out.stopped.any()


def test_samples_follow_the_tempered_distribution(lm):
    # 4000 first tokens against softmax(logits / T): chi-square per degree of freedom near 1.
    ids = torch.tensor([[5, 6, 7]]).expand(4000, 3)
    for temperature in (1.0, 0.25):
        out = draw(lm, ids, torch.full((4000,), 3), Sampling(1, temperature), [])
        with torch.no_grad():
            expected = (lm(input_ids=ids[:1]).logits[0, -1].double() / temperature).softmax(-1) * 4000
        counts = torch.bincount(out.response_ids[:, 0], minlength=len(expected)).double()
        chi = ((counts - expected) ** 2 / expected.clamp_min(1)).sum() / (expected > 1).sum()
        assert chi < 1.6, (temperature, chi)


def test_left_padding_does_not_change_what_is_likely(lm):
    ids = torch.tensor([[9, 9, 9, 9, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]])
    lengths = torch.tensor([3, 7])
    cold = Sampling(4, temperature=1e-4)
    out = draw(lm, ids, lengths, cold, [])
    alone = draw(lm, ids[:1, 4:], torch.tensor([3]), cold, [])
    assert out.response_ids[0].tolist() == alone.response_ids[0].tolist()


@pytest.mark.parametrize(
    "setting",
    [{"suppress_tokens": list(range(1, 320))}, {"min_new_tokens": 5}, {"no_repeat_ngram_size": 1},
     {"forced_eos_token_id": 3}, {"repetition_penalty": 1e-6}],
    ids=lambda s: next(iter(s)),
)  # fmt: skip
def test_the_model_s_own_generation_settings_do_not_shape_the_distribution(lm, setting, monkeypatch):
    ids, lengths = torch.ones(16, 2, dtype=torch.long), torch.full((16,), 2)
    plain = draw(lm, ids, lengths, Sampling(6), list(range(60)))
    own = GenerationConfig(**setting)
    monkeypatch.setattr(lm, "generation_config", own)
    again = draw(lm, ids, lengths, Sampling(6), list(range(60)))
    assert torch.equal(plain.response_ids, again.response_ids)
    assert lm.generation_config is own


@pytest.mark.parametrize(
    "sampling",
    [Sampling(24), Sampling(24, 0.5, num_responses=3), Sampling(24, 2.0, num_responses=3, min_new_tokens=18)],
    ids=str,
)
def test_what_was_drawn_comes_with_what_a_pass_would_find(lm, sampling):
    # Longer than the rows that have ended are kept for.
    stops = list(range(0, lm.config.vocab_size, 16))
    ids = torch.randint(lm.config.vocab_size, (8, 5), generator=torch.Generator().manual_seed(3))
    out = draw(lm, ids, torch.full((8,), 5), sampling, stops)
    assert len(set(out.response_lengths.tolist())) > 1
    prompts = ids.repeat_interleave(sampling.num_responses, dim=0)
    for row, length in enumerate(out.response_lengths.tolist()):
        tokens = out.response_ids[row, :length]
        with torch.no_grad():
            hidden = lm.model(input_ids=torch.cat([prompts[row], tokens])[None]).last_hidden_state[0, 4:-1]
        early = torch.arange(length) < sampling.min_new_tokens
        found = token_logprobs(
            hidden, lm.lm_head.weight, tokens, temperature=sampling.temperature, withheld=(early, torch.tensor(stops))
        )
        torch.testing.assert_close(out.own.logprobs[row, :length], found.logprobs, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(out.own.entropy[row, :length], found.entropy, atol=2e-5, rtol=1e-5)


def test_a_token_that_is_taken_back_is_not_written_down():
    drawing = _Draw(2, 1.0, torch.zeros(2, 1, 1))
    ids = torch.tensor([[5, 6, 1]])
    drawing(ids[:, :2], torch.zeros(1, 4))
    # One step more than is kept, as where the end of all rows is found late.
    drawing(ids, torch.tensor([[9.0, 0, 0, 0]]))
    torch.testing.assert_close(drawing.found[:, 0, 0], torch.tensor([-1.0, 1.0]) * math.log(4))


@pytest.mark.parametrize("wrong", [[math.nan, 0.0, 0.0], [-math.inf] * 3], ids=["nan", "nothing"])
def test_logits_that_are_no_numbers_are_refused(wrong):
    logits = torch.tensor([[0.0, 0.0, 0.0], wrong])
    drawing = _Draw(3, 1.0, None)
    for row, broken in ((0, False), (1, True), (0, True)):
        drawing(torch.zeros(1, 5, dtype=torch.long), logits[row, None])
        assert bool(drawing.broken) == broken


def test_a_model_that_gives_no_numbers_is_refused(lm):
    broken = copy.deepcopy(lm)
    broken.model.norm.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="expected logits that are numbers, got NaN in sampling"):
        draw(broken, torch.ones(2, 3, dtype=torch.long), torch.full((2,), 3), Sampling(2), [])


def test_generate_is_left_the_drawn_token_alone():
    scores = _Draw(1, 1.0, None)(torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 4))
    assert (scores == 0).sum(dim=1).tolist() == [1, 1, 1]
    assert (scores == -math.inf).sum() == 9


def test_a_model_that_rounds_leaves_its_log_probabilities_to_the_learner(lm):
    ids, lengths = torch.ones(2, 3, dtype=torch.long), torch.full((2,), 3)
    assert draw(lm, ids, lengths, Sampling(2), []).own is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert draw(lm, ids, lengths, Sampling(2), []).own is None
    half = copy.deepcopy(lm).to(torch.bfloat16)
    assert draw(half, ids, lengths, Sampling(2), []).own is None


def test_stop_tokens_come_from_model_tokenizer_and_user(lm, monkeypatch):
    monkeypatch.setattr(lm.generation_config, "eos_token_id", [7, 3])
    assert stop_ids(lm, Sampling(stop_token_ids=[9, 3]), 5) == [0, 3, 5, 7, 9]
    monkeypatch.setattr(lm.generation_config, "eos_token_id", None)
    assert stop_ids(lm, Sampling(), None) == [0]
    monkeypatch.setattr(lm.config, "eos_token_id", None)
    assert stop_ids(lm, Sampling(), None) == []
