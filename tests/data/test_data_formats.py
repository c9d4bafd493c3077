"""Rows in the shapes that data sets come in: dialogues, conversations, and what is wrong with some."""

import math
import re

import pytest
from helpers import tiny_tokenizer

from lit_vapo.data.formats import read_preference, read_prompt, shared_prompt
from lit_vapo.data.sources import Row

USER = {"role": "user", "content": "Name a prime."}
ASKED = "<bos>user:Name a prime.<eos><bos>assistant:"


def answer(text):
    return [{"role": "assistant", "content": text}]


def row(**values):
    return Row(values, "pairs.jsonl, line 3")


@pytest.fixture
def tokenizer(tmp_path):
    return tiny_tokenizer(tmp_path, chat_template=True)


def test_explicit_prompt(tokenizer):
    found = read_preference(row(prompt="p", chosen=" a", rejected=" b", margin=2), tokenizer)
    assert found == ("p", " a", " b", 2.0, False, 1.0, 1.0, None)


def test_what_a_row_says_of_its_preference(tokenizer):
    stated = row(prompt="p", chosen="a", rejected="b", agreement=0.75, weight=2, subset="chat")
    assert read_preference(stated, tokenizer) == ("p", "a", "b", 0.0, False, 0.75, 2.0, "chat")


def test_reward_bench(tokenizer):
    values = {"id": 30, "subset": "alpacaeval-easy", "chosen_model": "A", "rejected_model": "B"}
    found = read_preference(row(prompt="p", chosen="a", rejected="b", **values), tokenizer)
    assert found == ("p", "a", "b", 0.0, False, 1.0, 1.0, "alpacaeval-easy")


@pytest.mark.parametrize(("label", "chosen", "rejected"), [(1, "first", "second"), (2, "second", "first")])
def test_llmbar(tokenizer, label, chosen, rejected):
    values = {"input": "q", "output_1": "first", "output_2": "second", "label": label}
    assert read_preference(row(**values), tokenizer) == ("q", chosen, rejected, 0.0, False, 1.0, 1.0, None)
    assert read_prompt(row(**values), tokenizer) == ("q", False, None)


@pytest.mark.parametrize("label", [None, 0, 3, "1", True])
def test_llmbar_labels_are_one_or_two(tokenizer, label):
    values = {"input": "q", "output_1": "a", "output_2": "b", "label": label}
    with pytest.raises(ValueError, match=f"line 3: expected 1 or 2 in column 'label', got {label!r}"):
        read_preference(row(**values), tokenizer)


def test_implicit_prompt_without_turns_does_not_tear_words():
    assert shared_prompt("the film was good", "the film was great") == "the film was"
    assert shared_prompt("good", "great") == ""


def dialogue(*turns):
    return "".join(f"\n\n{who}: {said}" for who, said in zip(["Human", "Assistant"] * 3, turns, strict=False))


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        # The responses begin alike: the prompt ends at the marker, not inside them.
        (dialogue("hi", "I am fine"), dialogue("hi", "I am not"), "\n\nHuman: hi\n\nAssistant:"),
        # Two turns in common.
        (dialogue("a", "b", "c", "d"), dialogue("a", "b", "c", "e"), dialogue("a", "b", "c") + "\n\nAssistant:"),
        # They part in the first answer, and go on after it.
        (dialogue("a", "b", "c", "d"), dialogue("a", "x", "c", "d"), "\n\nHuman: a\n\nAssistant:"),
    ],
)
def test_implicit_prompt_of_dialogues(tokenizer, chosen, rejected, prompt):
    found = read_preference(row(chosen=chosen, rejected=rejected), tokenizer)
    assert found.prompt == prompt
    assert (found.prompt + found.chosen, found.prompt + found.rejected) == (chosen, rejected)
    assert read_prompt(row(chosen=chosen, rejected=rejected), tokenizer).prompt == prompt


def test_an_empty_prompt_is_a_prompt_for_preferences_only(tokenizer):
    assert read_preference(row(prompt="", chosen="a", rejected="b"), tokenizer)[:3] == ("", "a", "b")
    assert read_preference(row(prompt=None, chosen="x a", rejected="x b"), tokenizer)[:3] == ("x", " a", " b")


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": [USER], "chosen": answer("7"), "rejected": answer("9")},
        {"chosen": [USER, *answer("7")], "rejected": [USER, *answer("9")]},
        {"prompt": "Name a prime.", "chosen": answer("7"), "rejected": answer("9")},
        # UltraFeedback gives the prompt as text, and again as the first message of both conversations.
        {"prompt": "Name a prime.", "chosen": [USER, *answer("7")], "rejected": [USER, *answer("9")]},
        {"prompt": [USER], "chosen": [USER, *answer("7")], "rejected": [USER, *answer("9")]},
    ],
)
def test_conversations_in_every_shape_give_the_same_texts(tokenizer, values):
    assert read_preference(row(**values), tokenizer)[:5] == (ASKED, "7<eos>", "9<eos>", 0.0, True)
    assert read_prompt(row(**values), tokenizer) == (ASKED, True, [USER])


def test_conversations_of_several_turns(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    shared = [system, USER, *answer("2"), {"role": "user", "content": "Another."}]
    found = read_preference(row(chosen=[*shared, *answer("3")], rejected=[*shared, *answer("4")]), tokenizer)
    whole = "<bos>system:Be brief.<eos><bos>user:Name a prime.<eos><bos>assistant:2<eos><bos>user:Another.<eos>"
    assert found[:3] == (whole + "<bos>assistant:", "3<eos>", "4<eos>")


def test_a_response_ends_where_a_policy_would_stop(tokenizer):
    # ChatML templates write a newline after the end of a turn, which no policy writes.
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<eos>\n")
    found = read_preference(row(prompt=[USER], chosen=answer("7"), rejected=answer("9")), tokenizer)
    assert found[:3] == ("<bos>user:Name a prime.<eos>\n<bos>assistant:", "7<eos>", "9<eos>")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chosen": "a"}, "expected column 'rejected', got columns ['chosen']"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "expected text or messages in column 'chosen', got int"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "expected text or messages in column 'prompt', got int"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "expected a response in column 'chosen', got an empty one"),
        ({"prompt": "p", "chosen": "a", "rejected": " "}, "expected a response in column 'rejected', got an empty one"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "expected two different responses, got the same"),
        ({"chosen": "the same", "rejected": "the same"}, "expected two different responses, got the same"),
    ],
)
def test_bad_preferences_are_named(tokenizer, values, message):
    with pytest.raises(ValueError, match=re.escape("pairs.jsonl, line 3: " + message)):
        read_preference(row(**values), tokenizer)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": ""}, "expected a prompt in column 'prompt', got an empty one"),
        ({"text": "x"}, "expected column 'prompt', got columns ['text']"),
        ({"chosen": "good", "rejected": "great"}, "expected a prompt in column 'prompt', got an empty one"),
    ],
)
def test_bad_prompts_are_named(tokenizer, values, message):
    with pytest.raises(ValueError, match=re.escape("pairs.jsonl, line 3: " + message)):
        read_prompt(row(**values), tokenizer)


@pytest.mark.parametrize("margin", ["1", True, math.nan, math.inf])
def test_margins_are_finite_numbers(tokenizer, margin):
    with pytest.raises(ValueError, match=f"line 3: expected a number in column 'margin', got {margin!r}"):
        read_preference(row(prompt="p", chosen="a", rejected="b", margin=margin), tokenizer)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"prompt": [USER], "chosen": answer(None), "rejected": answer("9")},
            "a list of messages with role and content",
        ),
        ({"prompt": [USER], "chosen": [{"x": 1}], "rejected": answer("9")}, "a list of messages with role and content"),
        ({"prompt": [USER], "chosen": answer(""), "rejected": answer("9")}, "in column 'chosen', got an empty one"),
        ({"prompt": [USER], "chosen": answer("7"), "rejected": answer("7")}, "two different responses"),
        ({"prompt": [USER], "chosen": answer("7"), "rejected": "9"}, "in column 'rejected'"),
        ({"prompt": [], "chosen": answer("7"), "rejected": answer("9")}, "a prompt of at least one message, got none"),
        ({"chosen": answer("7"), "rejected": answer("9")}, "a prompt of at least one message, got none"),
        ({"chosen": [USER], "rejected": [USER, *answer("9")]}, "a response in column 'chosen', got an empty one"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "text in column 'prompt', got list"),
        ({"prompt": 5, "chosen": answer("7"), "rejected": answer("9")}, "text or messages in column 'prompt', got int"),
    ],
)
def test_bad_conversations_are_named(tokenizer, values, message):
    with pytest.raises(ValueError, match=re.escape("pairs.jsonl, line 3: expected") + ".*" + re.escape(message)):
        read_preference(row(**values), tokenizer)


def test_what_the_chat_template_refuses_is_named(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="line 3: expected messages that .* takes, got: roles must"):
        read_prompt(row(prompt=[USER]), tokenizer)


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}{% if add_generation_prompt %}:{% endif %}"
    with pytest.raises(ValueError, match="line 3: expected 'chosen' to continue the prompt under the chat template"):
        read_preference(row(prompt=[USER], chosen=answer("7"), rejected=answer("9")), tokenizer)


def test_without_a_chat_template_tokenizer_and_place_are_named(tmp_path):
    plain = tiny_tokenizer(tmp_path / "plain")
    plain.name_or_path = "the/plain-one"
    message = "line 3: expected a tokenizer with a chat template for conversational data, got 'the/plain-one'"
    with pytest.raises(ValueError, match=message):
        read_prompt(row(prompt=[USER]), plain)
    with pytest.raises(ValueError, match=message):
        read_preference(row(prompt=[USER], chosen=answer("7"), rejected=answer("9")), plain)
