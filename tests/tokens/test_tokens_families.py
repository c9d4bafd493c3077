"""Ten families of tokenizers, six styles of templates: every reader sees the tokens of the whole conversation."""

import pytest
from token_families import FAMILIES, STYLES, tokenizer_of

from lit_vapo.data.conversation import Preference
from lit_vapo.data.encoder import Encoder
from lit_vapo.data.labels import Stated
from lit_vapo.types import Prompt

STATED = Stated(0.0, 1.0, 1.0, None)
DAY = "26 Jul 2024"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 40, "b": 2}}}]
GOOD, BAD = "Paris, 1 café.\n\nGood!", "bad"


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "the quiet system"}
QUESTION = user("the capital of France:\nwas it good?")
CONVERSATIONS = {
    "one turn": Prompt([QUESTION]),
    "several turns": Prompt([user("a film"), assistant("good"), QUESTION]),
    "system": Prompt([SYSTEM, QUESTION]),
    "tools": Prompt([QUESTION], TOOLS),
    "a tool's answer": Prompt([QUESTION, assistant("", tool_calls=CALL), user("42")], TOOLS),
}
TEXTS = [
    ("the capital of France:\n", GOOD),
    ("a slow fil", "m was good"),
    ("Good", ".\n\nbad"),
    ("the plot ", " was"),
    ("", GOOD),
]
everywhere = pytest.mark.parametrize("family", FAMILIES)


def library(tokenizer, messages, tools=None, respond=False):
    """What transformers makes of a conversation."""
    return tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=respond, return_dict=False, date_string=DAY
    )


def until_end(ids, start, stops):
    """The tokens up to the first of `stops` from `start` on."""
    return ids[: next(i + 1 for i in range(start, len(ids)) if ids[i] in stops)]


@everywhere
@pytest.mark.parametrize("style", STYLES)
def test_conversations_are_those_of_the_template_in_every_stage(family, style):
    tokenizer, stops = tokenizer_of(family, style)
    encoder = Encoder(tokenizer, stops)
    for name, prompt in CONVERSATIONS.items():
        asked = library(tokenizer, prompt.content, prompt.tools, respond=True)
        whole = [
            until_end(library(tokenizer, [*prompt.content, assistant(x)], prompt.tools), len(asked) - 1, stops)
            for x in (GOOD, BAD)
        ]
        assert whole[0][-1] in stops
        # Reward training.
        pair = encoder.pair(Preference(prompt, [assistant(GOOD)], [assistant(BAD)], STATED), "here")
        assert [pair.prompt_ids + pair.chosen_ids, pair.prompt_ids + pair.rejected_ids] == whole, name
        # The policy's prompts; what it samples then follows in them.
        assert encoder.prompt(prompt, "here").ids == asked == pair.prompt_ids, name
        # PPO's scoring by a model of another tokenizer.
        again = encoder.response(prompt, GOOD, ended=True)
        assert (again.ids, again.prompt_length) == (whole[0], len(asked)), name
        cut = encoder.response(prompt, "Paris", ended=False)
        written = tokenizer.apply_chat_template(
            [*prompt.content, assistant("Paris")], tools=prompt.tools, tokenize=False, date_string=DAY
        )
        until_there = tokenizer(written[: written.rindex("Paris") + 5], add_special_tokens=False)["input_ids"]
        assert (cut.ids, cut.prompt_length) == (until_there, len(asked)), name


@everywhere
def test_texts_are_those_of_the_whole(family):
    tokenizer, stops = tokenizer_of(family, "chatml")
    encoder = Encoder(tokenizer, stops)
    for prompt, response in TEXTS:
        whole = tokenizer(prompt + response)["input_ids"]
        whole = [*(whole[:-1] if whole[-1] == tokenizer.eos_token_id else whole), tokenizer.eos_token_id]
        pair = encoder.pair(Preference(Prompt(prompt), response, " Rome", STATED), "here")
        assert pair.prompt_ids + pair.chosen_ids == whole
        assert encoder.response(Prompt(prompt), response, ended=True).ids == whole
        assert encoder.response(Prompt(prompt), response, ended=False).ids == whole[:-1]
        # As much of the prompt as can be told apart from the response, and nothing of that.
        alone = encoder.prompt(Prompt(prompt or "x"), "here").ids
        size = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
        assert whole[:size] == pair.prompt_ids or len(pair.prompt_ids) < size
        assert len(alone) - len(pair.prompt_ids) <= 4


@everywhere
@pytest.mark.parametrize("style", STYLES)
def test_the_way_of_rows_with_control_strings_is_the_plain_way_for_others(family, style, monkeypatch):
    tokenizer, stops = tokenizer_of(family, style)
    plain, careful = Encoder(tokenizer, stops), Encoder(tokenizer, stops)
    monkeypatch.setattr(careful, "_mentions", lambda *_: True)
    for prompt in CONVERSATIONS.values():
        preference = Preference(prompt, [assistant(GOOD)], [assistant(BAD)], STATED)
        assert careful.pair(preference, "here") == plain.pair(preference, "here")
        assert careful.prompt(prompt, "here") == plain.prompt(prompt, "here")


@everywhere
@pytest.mark.parametrize("style", STYLES)
def test_what_users_write_is_no_control_token(family, style):
    tokenizer, stops = tokenizer_of(family, style)
    encoder = Encoder(tokenizer, stops)
    control = set(encoder.control.ids.values()) - {tokenizer.unk_token_id}

    def counted(words, tools):
        prompt = Prompt([{"role": "system", "content": words}, user(f"the {words}\n")], tools)
        pair = encoder.pair(Preference(prompt, [assistant(f"a{words} b")], [assistant("bad")], STATED), "here")
        ids = pair.prompt_ids + pair.chosen_ids
        assert encoder.prompt(prompt, "here").ids == pair.prompt_ids
        assert encoder.response(prompt, f"a{words} b", ended=True).ids == ids
        assert words in pair.prompt
        return [i for i in ids if i in control], tokenizer.decode(ids)

    tools = [{"type": "function", "function": {"name": "WORDS", "description": "d"}}]
    for string in encoder.control.ids:
        words = f"{string}\n{string}x"
        ordinary, _ = counted("film", tools)
        named = [{"type": "function", "function": {"name": string, "description": words}}]
        found, text = counted(words, named)
        assert found == ordinary, string
        if family == "byte-level":
            assert text.count(words) >= 3
