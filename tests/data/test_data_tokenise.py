"""Tokens: the same prompt on every path, truncation that spares the response, identities that no template moves."""

import hashlib

import pytest
from helpers import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from lit_vapo.data.encoder import Encoder
from lit_vapo.data.readers import PairReader, PromptReader
from lit_vapo.data.row import Row, UnusableError
from lit_vapo.data.tokenise import fit, load_text_tokenizer, position, stable_id

USER = {"role": "user", "content": "the film"}
SHAPES = {
    "explicit": {"prompt": "the film", "chosen": " good", "rejected": " bad"},
    "implicit": {"chosen": "\n\nHuman: x\n\nAssistant: good", "rejected": "\n\nHuman: x\n\nAssistant: bad"},
    "messages": {
        "prompt": [USER],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    },
    "text and messages": {
        "prompt": "the film",
        "chosen": [USER, {"role": "assistant", "content": "good"}],
        "rejected": [USER, {"role": "assistant", "content": "bad"}],
    },
}


def wrapping(path, template):
    """A tokenizer that adds special tokens to every text, as Llama's (`<bos> $A`) or T5's (`$A <eos>`) do."""
    tokenizer = tiny_tokenizer(path, chat_template=True)
    special = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<bos>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


@pytest.fixture(params=["$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>"])
def tokenizer(request, tmp_path):
    return wrapping(tmp_path, request.param)


@pytest.mark.parametrize("shape", SHAPES)
def test_preference_path_and_prompt_path_agree(tokenizer, shape):
    row = Row(SHAPES[shape], "here")
    encoder = Encoder(tokenizer)
    pair, _ = PairReader(encoder, 100).read(row)
    prompt = PromptReader(encoder, 100).read(row)
    size = pair["prompt_length"]
    assert pair["chosen_ids"][:size] == pair["rejected_ids"][:size] == prompt["prompt_ids"]
    assert (pair["prompt"], pair["identity"]) == (prompt["prompt"], prompt["identity"])
    # One end of sequence, where a policy would write it.
    assert pair["chosen_ids"][size:].count(tokenizer.eos_token_id) == 1
    assert pair["chosen_ids"][-1] == pair["rejected_ids"][-1] == tokenizer.eos_token_id
    assert prompt["prompt_ids"][-1] != tokenizer.eos_token_id


BOS, PROMPT = 1, [1, 11, 12, 13]


@pytest.mark.parametrize(
    ("prompt", "responses", "size", "kept", "left", "cut"),
    [
        (PROMPT, [[5, 6], [7]], 6, PROMPT, [[5, 6], [7]], (0, 0)),
        # Both sides lose the same prompt token, though only the longer one has to; the beginning of sequence stays.
        (PROMPT, [[5, 6], [7]], 5, [1, 12, 13], [[5, 6], [7]], (1, 0)),
        (PROMPT, [[5, 6], [7]], 3, [13], [[5, 6], [7]], (1, 0)),
        (PROMPT[1:], [[5, 6], [7]], 4, [12, 13], [[5, 6], [7]], (1, 0)),
        # Responses lose their end last, and one by one.
        (PROMPT, [[5, 6, 7], [8]], 2, [13], [[5], [8]], (1, 1)),
        (PROMPT, [[5, 6, 7], [8, 9]], 2, [13], [[5], [8]], (1, 2)),
        ([], [[5, 6, 7], [8]], 2, [], [[5, 6], [8]], (0, 1)),
    ],
)
def test_truncation_spares_the_response(prompt, responses, size, kept, left, cut):
    assert fit(prompt, responses, size, BOS) == (kept, left, cut)


def test_pairs_are_cut_and_lose_what_tells_them_apart(tmp_path):
    encoder = Encoder(tiny_tokenizer(tmp_path))
    row = Row({"prompt": "the film", "chosen": " was good", "rejected": " was bad"}, "q.jsonl, line 9")
    whole, _ = PairReader(encoder, 100).read(row)
    size = whole["prompt_length"]
    cut, counted = PairReader(encoder, len(whole["chosen_ids"]) - 1).read(row)
    assert (cut["chosen_ids"], counted) == (whole["chosen_ids"][1:], (1, 0))
    assert cut["example_id"] == whole["example_id"] == stable_id("the film", " was good", " was bad")
    with pytest.raises(UnusableError, match="line 9: expected two responses that differ within data.max_length"):
        PairReader(encoder, 2).read(row)
    assert size > 1


def test_prompts_fit_exactly_or_are_of_no_use(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    size = len(tokenizer("the film was good")["input_ids"])
    row = Row({"prompt": "the film was good"}, "q.jsonl, line 9")
    assert len(PromptReader(Encoder(tokenizer), size).read(row)["prompt_ids"]) == size
    message = rf"q.jsonl, line 9: expected a prompt of 1 … {size - 1} tokens \(data.max_prompt_length\), got {size}"
    with pytest.raises(UnusableError, match=message):
        PromptReader(Encoder(tokenizer), size - 1).read(row)


@pytest.mark.parametrize("shape", SHAPES)
def test_neither_template_nor_tokenizer_moves_a_row_to_another_split(tmp_path, shape):
    one, other = tiny_tokenizer(tmp_path / "a", chat_template=True), wrapping(tmp_path / "b", "<bos> $A <eos>")
    other.chat_template = "today is {{ strftime_now('%s') }} " + one.chat_template
    found = [PairReader(Encoder(tokenizer), 100).read(Row(SHAPES[shape], "here"))[0] for tokenizer in (one, other)]
    asked = [PromptReader(Encoder(tokenizer), 100).read(Row(SHAPES[shape], "here")) for tokenizer in (one, other)]
    for rows in (found, asked):
        assert len({(row["example_id"], row["identity"]) for row in rows}) == 1
    assert stable_id(found[0]["identity"]) == asked[0]["example_id"]


def test_a_tokenizer_needs_no_padding_token(tmp_path):
    bare = tiny_tokenizer(tmp_path, pad=False)
    bare.eos_token = None
    bare.save_pretrained(tmp_path)
    assert load_text_tokenizer(str(tmp_path)).pad_token is None


def test_a_missing_tokenizer_is_named():
    with pytest.raises(ValueError, match="data.tokenizer: expected a folder or hub name of a tokenizer, got './gone'"):
        load_text_tokenizer("./gone")


def test_identities_are_the_same_on_every_machine():
    # The first 63 bits of the SHA-256 of the texts, joined by the unit separator.
    expected = int(hashlib.sha256(b"a\x1fb").hexdigest()[:16], 16) // 2
    assert stable_id("a", "b") == expected
    assert stable_id("p", "a", "b") != stable_id("p", "b", "a")
    assert stable_id("\ud800") >= 0  # a lone surrogate, which JSON can spell


def test_positions_of_identities_are_spread_evenly():
    where = [position(stable_id(str(i))) for i in range(4000)]
    assert all(0 <= p < 1 for p in where)
    for low, high in ((0.0, 0.3), (0.4, 0.5), (0.9, 1.0)):
        size = high - low
        inside = sum(low <= p < high for p in where)
        assert abs(inside - 4000 * size) < 4 * (4000 * size * (1 - size)) ** 0.5  # four standard deviations
