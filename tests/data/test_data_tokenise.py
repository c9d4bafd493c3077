"""Tokens: one beginning of sequence, the same prompt on every path, and truncation that spares the response."""

import hashlib

import pytest
from helpers import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from lit_vapo.data.formats import Preference, Prompt, read_preference, read_prompt
from lit_vapo.data.sources import Row
from lit_vapo.data.tokenise import (
    load_text_tokenizer,
    position,
    response_ids,
    stable_id,
    tokenise_preference,
    tokenise_prompt,
)

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
    pair, _ = tokenise_preference(read_preference(row, tokenizer), tokenizer, 100, append_eos=True)
    prompt = tokenise_prompt(read_prompt(row, tokenizer), tokenizer, 100, "here")
    size = pair["prompt_length"]
    assert pair["chosen_ids"][:size] == pair["rejected_ids"][:size] == prompt["prompt_ids"]
    assert pair["prompt"] == prompt["prompt"]
    # One end of sequence, where a policy would write it.
    assert pair["chosen_ids"][size:].count(tokenizer.eos_token_id) == 1
    assert pair["chosen_ids"][-1] == pair["rejected_ids"][-1] == tokenizer.eos_token_id
    assert prompt["prompt_ids"][-1] != tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("text", "templated", "count"),
    [("the film", False, 1), ("<bos>the film", False, 1), ("<bos>user:the film", True, 1)],
)
def test_beginning_of_sequence_comes_once(tmp_path, text, templated, count):
    tokenizer = wrapping(tmp_path, "<bos> $A")
    ids = tokenise_prompt(Prompt(text, templated), tokenizer, 100, "here")["prompt_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == count


def preference(prompt="the film was good and", chosen=" good", rejected=" bad bad"):
    return Preference(prompt, chosen, rejected, 0.0, False)


def test_truncation_starts_exactly_above_the_limit(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    whole, _ = tokenise_preference(preference(), tokenizer, 1000, append_eos=True)
    longest = max(len(whole["chosen_ids"]), len(whole["rejected_ids"]))
    assert tokenise_preference(preference(), tokenizer, longest, append_eos=True) == (whole, (0, 0))
    cut, counted = tokenise_preference(preference(), tokenizer, longest - 1, append_eos=True)
    assert counted == (1, 0)
    # Both sides lose the same prompt token, though only the longer one had to.
    assert cut["chosen_ids"] == whole["chosen_ids"][1:]
    assert cut["rejected_ids"] == whole["rejected_ids"][1:]


def test_truncation_keeps_the_beginning_of_sequence(tmp_path):
    tokenizer = wrapping(tmp_path, "<bos> $A")
    whole, _ = tokenise_preference(preference(), tokenizer, 1000, append_eos=True)
    size, response = whole["prompt_length"], whole["rejected_ids"][whole["prompt_length"] :]
    cut, counted = tokenise_preference(preference(), tokenizer, len(response) + 3, append_eos=True)
    assert counted == (1, 0)
    assert cut["rejected_ids"] == [tokenizer.bos_token_id, *whole["rejected_ids"][size - 2 : size], *response]
    least, _ = tokenise_preference(preference(), tokenizer, len(response) + 1, append_eos=True)
    assert least["rejected_ids"] == [whole["rejected_ids"][size - 1], *response]


def test_truncation_cuts_responses_last_and_one_by_one(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    pair = preference(chosen=" good", rejected=" bad" * 10)
    whole, _ = tokenise_preference(pair, tokenizer, 1000, append_eos=True)
    size = whole["prompt_length"]
    chosen = whole["chosen_ids"][size:]
    cut, counted = tokenise_preference(pair, tokenizer, len(chosen) + 1, append_eos=True)
    assert counted == (1, 1)
    assert cut["chosen_ids"] == [whole["chosen_ids"][size - 1], *chosen]
    assert cut["rejected_ids"] == whole["rejected_ids"][size - 1 : size + len(chosen)]


def test_without_a_prompt_the_response_may_fill_everything(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    row, counted = tokenise_preference(preference(prompt="", chosen=" good"), tokenizer, 3, append_eos=True)
    assert row["prompt_length"] == 0
    assert len(row["rejected_ids"]) == 3
    assert counted.prompts == 0


def test_the_end_of_sequence_is_optional_and_never_double(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    end = tokenizer.eos_token_id
    bare = response_ids(tokenizer, " good", append_eos=False)
    assert end not in bare
    assert response_ids(tokenizer, " good", append_eos=True) == [*bare, end]
    assert response_ids(tokenizer, " good<eos>", append_eos=True) == [*bare, end]


def test_prompts_fit_exactly_or_are_refused(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    size = len(tokenizer("the film was good")["input_ids"])
    prompt = Prompt("the film was good", False)
    assert len(tokenise_prompt(prompt, tokenizer, size, "q.jsonl, line 9")["prompt_ids"]) == size
    message = rf"q.jsonl, line 9: expected a prompt of 1 … {size - 1} tokens \(data.max_prompt_length\), got {size}"
    with pytest.raises(ValueError, match=message):
        tokenise_prompt(prompt, tokenizer, size - 1, "q.jsonl, line 9")


def test_padding_token_is_the_tokenizers_own_or_the_end(tmp_path):
    tiny_tokenizer(tmp_path / "own")
    own = load_text_tokenizer(str(tmp_path / "own"))
    assert own.pad_token == "<pad>"
    neither = tiny_tokenizer(tmp_path / "neither", pad=False)
    neither.eos_token = None
    neither.save_pretrained(tmp_path / "neither")
    with pytest.raises(ValueError, match="data.tokenizer: expected a pad or an end-of-sequence token, got neither"):
        load_text_tokenizer(str(tmp_path / "neither"))


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
