"""The transformers generator: rows that leave, prompts that are read once, stop strings, a minimum length."""

import helpers
import pytest
import torch
from torch import nn

from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import Pretrained, load_causal_lm, load_tokenizer
from lit_vapo.models.transformers_generator import TransformersGenerator

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
KINDS = {
    "llama": {},
    "gpt2": {},
    # Windows shorter than the prompts; a mixture of window and full attention; convolution states without keys.
    "mistral": {"sliding_window": 3},
    "gemma3_text": {
        "sliding_window": 3, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}  # fmt: skip
# Prompts of 1, 3, 5 and 6 tokens; what pads them is the end of sequence, and a stop token.
PROMPTS = [[300], [5, 6, 7], [9, 8, 7, 0, 5], [1, 2, 3, 4, 5, 6]]
STOPS = list(range(0, 320, 5))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("generator")

    def folder(kind):
        path = root / kind
        if not path.exists():
            helpers.tiny_model(path, helpers.tiny_tokenizer(path, pad=False), kind, **KINDS[kind])
        return str(path)

    return folder


@pytest.fixture(scope="module")
def lm(folders):
    return load_causal_lm(Pretrained(folders("llama")))


@pytest.fixture(scope="module")
def tokenizer(folders):
    return load_tokenizer(Pretrained(folders("llama")))


def padded(prompts, filler=0):
    lengths = torch.tensor([len(p) for p in prompts])
    return torch.tensor([[filler] * (int(lengths.max()) - len(p)) + p for p in prompts]), lengths


def draw(lm, prompts, sampling, stops=(), drop_every=16, seed=0, tokenizer=None):
    torch.manual_seed(seed)
    return TransformersGenerator(drop_every)(lm, tokenizer, *padded(prompts), sampling, list(stops))


def responses(out):
    return [ids[:n] for ids, n in zip(out.response_ids.tolist(), out.response_lengths.tolist(), strict=True)]


@pytest.mark.parametrize("drop_every", [1, 3, None])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_leave_change_nothing_for_those_that_stay(folders, kind, drop_every):
    # Cold sampling is greedy: each row must be what transformers generates for its prompt alone.
    lm = load_causal_lm(Pretrained(folders(kind)))
    prompts = [*PROMPTS, *([i, 2 * i, 3] for i in range(10, 16))]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = lm.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=STOPS,
            pad_token_id=0,
        )  # fmt: skip
        expected.append(out[0, len(prompt) :].tolist())
    assert len({len(e) for e in expected}) > 1
    for count in (1, 2):
        out = draw(lm, prompts, Sampling(12, temperature=1e-5, num_responses=count), STOPS, drop_every)
        assert responses(out) == [e for e in expected for _ in range(count)]
        assert out.stopped.tolist() == [e[-1] in STOPS for e in expected for _ in range(count)]


def passes(lm, monkeypatch):
    """Rows and columns of every forward pass from now on."""
    seen, forward = [], lm.model.forward
    monkeypatch.setattr(
        lm.model, "forward", lambda *a, **kw: (seen.append(kw["input_ids"].shape), forward(*a, **kw))[1]
    )
    return seen


def test_a_prompt_is_read_once_and_a_row_that_ended_never_again(lm, monkeypatch):
    seen = passes(lm, monkeypatch)
    out = draw(lm, PROMPTS, Sampling(6, num_responses=8), STOPS, drop_every=1)
    assert 0 < out.stopped.sum() < 32
    # All but the last token of four prompts; then for every response its prompt's last token and its own but the last.
    assert sum(rows * columns for rows, columns in seen) == 4 * 5 + int(out.response_lengths.sum())
    seen.clear()
    draw(lm, PROMPTS, Sampling(10), STOPS, drop_every=None)
    assert {rows for rows, _ in seen} == {4}


def test_responses_to_a_prompt_stand_together_and_differ(lm):
    out = draw(lm, [[5], [300]], Sampling(6, num_responses=3))
    assert out.response_ids.shape == (6, 6)
    assert len({tuple(r) for r in responses(out)}) == 6
    cold = draw(lm, [[5], [300]], Sampling(6, 1e-5, num_responses=3)).response_ids
    assert torch.equal(cold[0], cold[2])
    assert not torch.equal(cold[2], cold[3])


def test_a_cache_that_cannot_be_selected_from_is_not_used(lm, monkeypatch):
    sampling = Sampling(10, 1e-5, num_responses=2)
    expected = responses(draw(lm, PROMPTS, sampling, STOPS, drop_every=2))
    monkeypatch.setattr("lit_vapo.models.transformers_generator.Cache", int)
    assert responses(draw(lm, PROMPTS, sampling, STOPS, drop_every=2)) == expected


def test_the_same_seed_gives_the_same_responses(lm):
    one, two, other = (draw(lm, PROMPTS, Sampling(10, num_responses=4), STOPS, 2, seed) for seed in (1, 1, 2))
    assert responses(one) == responses(two)
    assert responses(one) != responses(other)


@pytest.mark.parametrize("drop_every", [1, None])
def test_rows_that_stay_follow_the_distribution(lm, drop_every):
    # Third tokens against their probabilities given the first two: chi-square per degree of freedom near 1.
    stops = list(range(160))
    out = draw(lm, [[5, 6, 7]], Sampling(3, 0.5, num_responses=6000, min_new_tokens=1), stops, drop_every)
    assert not torch.isin(out.response_ids[:, 0], torch.tensor(stops)).any()
    rows = out.response_ids[out.response_lengths == 3]
    assert 200 < len(rows) < 5500
    with torch.no_grad():
        firsts, which = rows[:, :2].unique(dim=0, return_inverse=True)
        ids = torch.cat([torch.tensor([[5, 6, 7]]).expand(len(firsts), 3), firsts], 1)
        expected = (lm(input_ids=ids).logits[:, -1].double() / 0.5).softmax(-1)[which].sum(0)
    counts = torch.bincount(rows[:, 2], minlength=len(expected)).double()
    often = expected > 2
    assert ((counts - expected) ** 2 / expected)[often].sum() / often.sum() < 1.6


def test_a_minimum_length_holds_back_every_stop_token(lm):
    # Half of the vocabulary stops, and pieces of the response are shorter than the minimum.
    out = draw(lm, PROMPTS, Sampling(9, num_responses=40, min_new_tokens=4), range(160), drop_every=3)
    assert not torch.isin(out.response_ids[:, :4], torch.arange(160)).any()
    assert out.response_lengths.min() == 5
    assert out.response_lengths.float().mean() < 6.5


@pytest.fixture(scope="module")
def speller(folders, tokenizer):
    """A model that writes a few pieces of words only, by a bias on its logits."""
    model = load_causal_lm(Pretrained(folders("llama")))
    pieces = ["t", "h", "e", "he", "the", "Ġ", "Ã", "©"]
    ids = tokenizer.convert_tokens_to_ids(pieces)
    assert None not in ids
    bias = torch.full((model.config.vocab_size,), -1e4)
    bias[ids] = 0.0
    model.lm_head.bias = nn.Parameter(bias, requires_grad=False)
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight), requires_grad=False)
    return model


@pytest.mark.parametrize("drop_every", [2, None])
@pytest.mark.parametrize(
    ("strings", "stops"), [(["the"], []), (["hee", "t t"], []), (["é"], []), (["he", " t"], ["e"])], ids=str
)
def test_a_response_ends_with_the_token_that_completes_a_stop_string(speller, tokenizer, strings, stops, drop_every):
    stops = tokenizer.convert_tokens_to_ids(stops)
    # A prompt that has a stop string ends nothing, and one that stands half in the prompt is none.
    prompts = [tokenizer(text)["input_ids"] for text in ("the hee t t é he", "t", "he", "the th")]
    out = draw(speller, prompts, Sampling(12, num_responses=30, stop_strings=strings), stops, drop_every, 0, tokenizer)
    assert out.stopped.sum() > 10
    assert out.response_lengths.unique().numel() > 4
    for ids, stopped in zip(responses(out), out.stopped.tolist(), strict=True):
        texts = [tokenizer.decode(ids[: t + 1]) for t in range(len(ids))]
        ended = [ids[t] in stops or any(s in text for s in strings) for t, text in enumerate(texts)]
        assert ended == [False] * (len(ids) - 1) + [stopped]
        assert stopped or len(ids) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_responses": 0}, r"sampling.num_responses: expected at least 1, got 0"),
     ({"temperature": float("nan")}, r"sampling.temperature: expected a number above 0, got nan"),
     ({"min_new_tokens": -1}, r"sampling.min_new_tokens: expected 0 … 63 .*, got -1"),
     ({"min_new_tokens": 4, "max_new_tokens": 4}, r"sampling.min_new_tokens: expected 0 … 3 .*, got 4"),
     ({"stop_strings": ["a", ""]}, r"sampling.stop_strings: expected a list of non-empty strings, got \['a', ''\]"),
     ({"stop_strings": "User:"}, r"sampling.stop_strings: expected a list of non-empty strings, got 'User:'"),
     ({"stop_strings": ["a"], "min_new_tokens": 2}, r"sampling.min_new_tokens: expected 0 with stop_strings, got 2")],
    ids=str,
)  # fmt: skip
def test_impossible_sampling_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_an_impossible_interval_is_refused():
    with pytest.raises(ValueError, match=r"generator.drop_every: expected at least 1 or null, got 0"):
        TransformersGenerator(0)
