"""Conversations and texts on their way to tokens: where prompts end, what templates may do, what is refused."""

import pickle

import pytest
from helpers import tiny_tokenizer
from token_families import tokenizer_of

from lit_vapo.data import encoder as encoders
from lit_vapo.data.conversation import Preference
from lit_vapo.data.encoder import Encoder
from lit_vapo.data.labels import Stated
from lit_vapo.data.templates import ChatTemplate
from lit_vapo.stops import stop_tokens
from lit_vapo.types import Prompt

STATED = Stated(0.0, 1.0, 1.0, None)
U, A = {"role": "user", "content": "the film"}, {"role": "assistant", "content": "good"}
TURN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
OPENED = "{% if add_generation_prompt %}<|assistant|>"
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def encoder(template, **options):
    """An encoder with a byte-level tokenizer and this template."""
    tokenizer = pickle.loads(pickle.dumps(tokenizer_of("byte-level", "zephyr")[0]))
    tokenizer.chat_template = template
    return Encoder(tokenizer, **options)


def texts(made, prompt, chosen="good", rejected="bad"):
    """The texts of a pair's prompt and of its preferred response."""
    answers = [chosen, rejected]
    if not isinstance(prompt.content, str):
        answers = [x if isinstance(x, list) else [{"role": "assistant", "content": x}] for x in answers]
    pair = made.pair(Preference(prompt, *answers, STATED), "p.jsonl, line 7")
    assert made.prompt(prompt, "here").ids == pair.prompt_ids
    return made.tokenizer.decode(pair.prompt_ids), made.tokenizer.decode(pair.chosen_ids)


# Where prompts end.


def test_a_prompt_that_ends_with_the_assistant_goes_on():
    made = encoder(TURN + OPENED + "{% endif %}")
    prefilled = Prompt([U, {"role": "assistant", "content": "Well,"}])
    assert texts(made, prefilled, " good") == ("<|user|>the film</s><|assistant|>Well,", " good</s>")
    assert made.prompt(prefilled, "here").text == made.tokenizer.apply_chat_template(
        prefilled.content, tokenize=False, continue_final_message=True
    )
    assert made.tokenizer.decode(made.response(prefilled, " bad", ended=True).ids).endswith("|>Well, bad</s>")
    parts = Prompt([U, {"role": "assistant", "content": [{"type": "text", "text": "Well,"}]}])
    by_parts = encoder(
        "{% for m in messages %}{{ m.content if m.content is string else m.content[-1].text }}</s>{% endfor %}"
    )
    assert texts(by_parts, parts, " good") == ("the film</s>Well,", " good</s>")
    with pytest.raises(ValueError, match=r"here: expected text at the end of the prompt's last message.*got None"):
        made.prompt(Prompt([U, {"role": "assistant", "tool_calls": TOOLS}]), "here")


@pytest.mark.parametrize(
    ("finished", "opened", "response"),
    [("", "<think>\n", "good</s>"), ("<think>\n\n</think>\n\n", "<think>\n", "\n</think>\n\ngood</s>")],
    ids=["left out of answers", "empty in answers"],
)
def test_a_think_block_that_only_a_prompt_opens_is_left_to_the_policy(finished, opened, response):
    turn = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
        + finished
        + "{% endif %}{{ m.content }}</s>{% endfor %}"
    )
    made = encoder(turn + OPENED + "{% if thinking is not defined %}" + opened + "{% endif %}{% endif %}")
    if finished:
        assert texts(made, Prompt([U])) == ("<|user|>the film</s><|assistant|><think>\n", response)
    else:
        with pytest.warns(UserWarning, match=r"opens an answer with '<think>\\n', .*data.chat_template_kwargs"):
            assert texts(made, Prompt([U])) == ("<|user|>the film</s><|assistant|>", response)
        told = encoder(made.tokenizer.chat_template, template_kwargs={"thinking": False})
        assert texts(told, Prompt([U])) == ("<|user|>the film</s><|assistant|>", response)
    assert made.tokenizer.decode(made.response(Prompt([U]), "good", ended=True).ids).endswith(finished + "good</s>")


def test_a_template_that_changes_the_prompt_before_an_answer_is_refused():
    # The system's message goes into the last message, and that is the answer.
    folding = (
        "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>"
        "{% if loop.last %}{{ messages[0].content }}\n{% endif %}{{ m.content }}</s>{% endfor %}"
    )
    prompt = Prompt([{"role": "system", "content": "Be kind."}, U])
    with pytest.raises(
        ValueError, match=r"here: expected the chat template of .*'<\|user\|>Be kind.*'<\|user\|>the film"
    ):
        encoder(folding + OPENED + "{% endif %}").prompt(prompt, "here")
    shouting = (
        "{% for m in messages %}{{ m.content | upper if messages[-1].content == 'good' else m.content }}</s>"
        "{% endfor %}"
    )
    with pytest.raises(
        ValueError, match=r"line 7: expected .*'the film</s>' and 'THE FILM</s>GOOD</s>'.*chat_template_kwargs"
    ):
        texts(encoder(shouting), Prompt([U]))


def test_answers_of_several_messages_end_with_their_last():
    made = encoder(TURN + "\n" + OPENED + "{% endif %}")
    answer = [A, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "It is 42."}]
    assert texts(made, Prompt([U]), answer)[1] == "good</s><|tool|>42</s><|assistant|>It is 42.</s>"
    with pytest.raises(ValueError, match=r"line 7: expected an answer that ends with a message of the assistant"):
        texts(made, Prompt([U]), answer[:2])


def test_a_token_across_the_boundary_is_the_responses():
    tokenizer, _ = tokenizer_of("tiktoken", "chatml")
    pair = Encoder(tokenizer).pair(Preference(Prompt("It was good."), "\n\nReview", " bad", STATED), "here")
    # '.\n\n' is one token: neither response is read after a prompt that the other does not have.
    assert tokenizer.decode(pair.chosen_ids) == ".\n\nReview</s>"
    assert tokenizer.decode(pair.rejected_ids) == ". bad</s>"


def test_a_token_that_swallows_white_space_stays_in_the_prompt():
    tokenizer, stops = tokenizer_of("byte-level", "phi 3")
    asked = tokenizer.apply_chat_template([U], add_generation_prompt=True, return_dict=False)
    assert asked[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")
    answers = ([{"role": "assistant", "content": x}] for x in (" good", "\nbad"))
    assert Encoder(tokenizer, stops).pair(Preference(Prompt([U]), *answers, STATED), "here").prompt_ids == asked


# Where responses end.


def test_a_response_ends_at_the_first_stop_token_and_every_stop_counts():
    tokenizer, stops = tokenizer_of("byte-level", "gemma 3")
    assert tokenizer.convert_tokens_to_ids("<end_of_turn>") not in tokenizer.all_special_ids
    answer = texts(Encoder(tokenizer, stops), Prompt([U]))[1]
    assert answer == "good<end_of_turn>"
    assert texts(Encoder(tokenizer), Prompt([U]))[1] == "good<end_of_turn></s>"  # one nobody told of stops nothing


def test_without_a_stop_token_the_end_is_added_if_asked():
    bare = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert texts(encoder(bare), Prompt([U])) == ("user:the film\n\nassistant:", "good</s>")
    assert texts(encoder(bare, append_eos=False), Prompt([U]))[1] == "good"
    assert texts(encoder(bare), Prompt("the film"), " good") == ("the film", " good</s>")
    assert texts(encoder(bare, append_eos=False), Prompt("the film"), " good") == ("the film", " good")


def test_stop_tokens_that_are_words_end_texts_too():
    tokenizer, _ = tokenizer_of("byte-level", "zephyr")
    (line,) = tokenizer("\n")["input_ids"]
    assert texts(Encoder(tokenizer, [line]), Prompt("the film"), " good\nbad")[1] == " good\n"
    assert stop_tokens([7, 2], None, 2) == (2, 7)


# Users' texts.


def test_strings_of_control_tokens_stay_text_in_texts():
    tokenizer, stops = tokenizer_of("byte-level", "chatml")
    made = Encoder(tokenizer, stops)
    with pytest.warns(UserWarning, match=r"here: a text mentions control tokens .* data.templated"):
        prompt = made.prompt(Prompt("the film<|im_end|>"), "here")
    assert prompt.text == tokenizer.decode(prompt.ids) == "the film<|im_end|>"
    assert not set(prompt.ids) & set(made.control.ids.values())
    # Told of once.
    answer = made.response(Prompt("the film"), "good</s>", ended=True)
    assert answer.ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(answer.ids) == "the filmgood</s></s>"


def test_texts_in_a_template_s_form_keep_its_control_tokens():
    tokenizer, stops = tokenizer_of("tiktoken", "chatml")
    made = Encoder(tokenizer, stops, templated=True)
    start, end, first = (tokenizer.convert_tokens_to_ids(x) for x in ("<|im_start|>", "<|im_end|>", "<s>"))
    for text in ("<s><|im_start|>user\nthe film<|im_end|>\n", "<|im_start|>user\nthe film<|im_end|>\n"):
        prompt, chosen, *_ = made.pair(Preference(Prompt(text), "good<|im_end|>\n", "bad", STATED), "here")
        assert [i for i in prompt if i in (start, end, first)] == [first, start, end]
        assert chosen[-1] == end
    with pytest.raises(ValueError, match=r"here: expected texts, for data.templated is true, got messages"):
        made.prompt(Prompt([U]), "here")


def test_slow_tokenizers_cannot_tell_text_from_control(monkeypatch):
    made = encoder(TURN)
    monkeypatch.setattr(type(made.tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match=r"here: expected a fast tokenizer to read control tokens as text"):
        made.prompt(Prompt([{"role": "user", "content": "</s>"}]), "here")


def test_private_use_characters_and_torn_strings_are_refused_beside_control_tokens():
    with pytest.raises(ValueError, match=r"here: expected no private-use characters"):
        encoder(TURN).prompt(Prompt([{"role": "user", "content": "</s>\U000f0000"}]), "here")
    with pytest.raises(ValueError, match=r"here: expected a chat template that leaves strings of control tokens"):
        encoder("{{ messages[0].content[:2] }}").prompt(Prompt([{"role": "user", "content": "</s>"}]), "here")


def test_without_offsets_the_cut_is_where_prompt_and_whole_part(monkeypatch):
    plain = encoder(TURN)
    pair = plain.pair(Preference(Prompt("the film was"), " good", "ted", STATED), "here")
    made = encoder(TURN)
    monkeypatch.setattr(type(made.tokenizer), "is_fast", False)
    slow = Encoder(made.tokenizer).pair(Preference(Prompt("the film was"), " good", "ted", STATED), "here")
    assert slow.chosen_ids[-1] == made.tokenizer.eos_token_id
    assert pair.prompt_ids + pair.chosen_ids == slow.prompt_ids + slow.chosen_ids


# Templates.


def test_tools_reach_the_template_or_are_refused():
    reading = "{% if tools %}{{ tools[0].function.name }}{% endif %}" + TURN
    assert encoder(reading).prompt(Prompt([U], TOOLS), "here").text == "add<|user|>the film</s>"
    with pytest.raises(ValueError, match=r"here: expected a chat template that reads tools"):
        encoder(TURN).prompt(Prompt([U], TOOLS), "here")
    with pytest.raises(ValueError, match=r"here: expected messages beside tools, got a text"):
        encoder(reading).prompt(Prompt("the film", TOOLS), "here")


def test_tool_calls_and_null_contents_reach_the_template():
    calling = (
        "{% for m in messages %}{{ m.content or '' }}"
        "{% if m.tool_calls %}[{{ m.tool_calls[0].function.name }}]{% endif %}</s>{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": TOOLS}
    assert texts(encoder(calling), Prompt([U]), [call]) == ("the film</s>", "[add]</s>")
    assert (
        texts(encoder(calling), Prompt([U, call, {"role": "tool", "content": "4"}]))[0] == "the film</s>[add]</s>4</s>"
    )


def test_tool_calls_that_a_template_does_not_write_are_refused():
    call = {"role": "assistant", "content": None, "tool_calls": TOOLS}
    silent = encoder("{% for m in messages %}{{ m.content or '' }}</s>{% endfor %}")
    for prompt, answer in ((Prompt([U]), [call]), (Prompt([U, call, {"role": "tool", "content": "4"}]), "good")):
        with pytest.raises(ValueError, match=r"line 7: expected a chat template that writes tool calls"):
            texts(silent, prompt, answer)


@pytest.mark.parametrize("call", ['strftime_now("%d %b %Y")', "strftime_now( '%d %b %Y' )"])
def test_the_day_is_always_the_same(call):
    made = encoder("{% set day = " + call + " if strftime_now is defined %}{{ day }}" + TURN)
    assert made.prompt(Prompt([U]), "here").text == "26 Jul 2024<|user|>the film</s>"


def test_a_day_that_cannot_be_fixed_is_told_of():
    made = encoder("{% set f = '%Y' %}{{ strftime_now(f) }}" + TURN)
    with pytest.warns(UserWarning, match=r"asks for the day in a way that cannot be fixed"):
        made.prompt(Prompt([U]), "here")
    made.prompt(Prompt([U]), "here")  # once


def test_arguments_reach_the_template_and_may_replace_it():
    shown = encoder("{{ mood }}" + TURN, template_kwargs={"mood": "calm"})
    assert shown.prompt(Prompt([U]), "here").text == "calm<|user|>the film</s>"
    other = encoder(TURN, template_kwargs={"chat_template": "{{ messages[0].content }}"})
    assert other.prompt(Prompt([U]), "here").text == "the film"
    with pytest.raises(ValueError, match=r"data.chat_template_kwargs: .* got \['tokenize', 'tools'\]"):
        encoder(TURN, template_kwargs={"tools": [], "tokenize": True})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "expected a tokenizer with a chat template for conversational data"),
        ("{{ raise_exception('roles must alternate') }}", "expected messages that the chat template of .* roles must"),
        (
            "{{ messages[0].nothing.at_all }}",
            "expected messages that the chat template of .* takes, got: .*no attribute 'nothing'",
        ),
        ("{{ 'x' * 20000000 }}", "expected .* to write at most 10000000 characters, got 20000000"),
    ],
)
def test_a_template_that_is_missing_refuses_or_runs_wild_is_named_with_the_row(template, message):
    with pytest.raises(ValueError, match="p.jsonl, line 7: " + message):
        encoder(template).prompt(Prompt([U]), "p.jsonl, line 7")


def test_a_template_that_loops_is_stopped(monkeypatch):
    monkeypatch.setattr(encoders, "SECONDS", 0.2)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match=r"here: expected a chat template that ends within 0.2 seconds"):
        encoder(loop).prompt(Prompt([U]), "here")


def test_an_encoder_may_be_sent_to_another_process(tmp_path):
    made = Encoder(tiny_tokenizer(tmp_path, chat_template=True))
    row = Prompt([{"role": "user", "content": "a <eos> b"}])
    there = pickle.loads(pickle.dumps(made))
    assert there.prompt(row, "here") == made.prompt(row, "here")
    again = pickle.loads(pickle.dumps(there))  # with all that its first row has made
    assert again.prompt(row, "here") == made.prompt(row, "here")
    assert isinstance(again.template, ChatTemplate)
