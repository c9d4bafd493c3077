"""Rows in the shapes that data sets come in: dialogues, conversations, and what is wrong with some."""

import json
import re

import datasets
import pytest
from helpers import write_jsonl

from lit_vapo.data.conversation import Preference
from lit_vapo.data.formats import read_preference, read_prompt, shared_prompt
from lit_vapo.data.labels import Stated
from lit_vapo.data.row import Row, UnusableError, attempt
from lit_vapo.data.sources import iterate_rows, load_rows
from lit_vapo.types import Prompt

PLAIN = Stated(0.0, 1.0, 1.0, None)
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]}


def said(role, content, **more):
    return {"role": role, "content": content, **more}


USER = said("user", "Name a prime.")
SYSTEM = said("system", "Be brief.")
FOUR, FIVE = [said("assistant", "4")], [said("assistant", "5")]


def row(**values):
    return Row(values, "pairs.jsonl, line 3")


def read(**values):
    """Prompt, chosen and rejected of a preference."""
    found = read_preference(row(**values))
    return found.prompt, found.chosen, found.rejected


# Texts.


def test_explicit_prompt():
    found = read_preference(row(prompt="p", chosen=" a", rejected=" b", margin=2))
    assert found == Preference(Prompt("p"), " a", " b", Stated(2.0, 1.0, 1.0, None))


def test_what_a_row_says_of_its_preference():
    stated = row(prompt="p", chosen="a", rejected="b", agreement=0.75, weight=2, subset="chat")
    assert read_preference(stated).labels == Stated(0.0, 0.75, 2.0, "chat")


def test_reward_bench():
    values = {"id": 30, "subset": "alpacaeval-easy", "chosen_model": "A", "rejected_model": "B"}
    found = read_preference(row(prompt="p", chosen="a", rejected="b", **values))
    assert found == Preference(Prompt("p"), "a", "b", PLAIN._replace(subset="alpacaeval-easy"))


@pytest.mark.parametrize(("label", "chosen", "rejected"), [(1, "first", "second"), (2, "second", "first")])
def test_llmbar(label, chosen, rejected):
    values = {"input": "q", "output_1": "first", "output_2": "second", "label": label}
    assert read(**values) == (Prompt("q"), chosen, rejected)
    assert read_prompt(row(**values)) == Prompt("q")


@pytest.mark.parametrize("label", [None, 0, 3, "1", True])
def test_llmbar_labels_are_one_or_two(label):
    values = {"input": "q", "output_1": "a", "output_2": "b", "label": label}
    with pytest.raises(ValueError, match=f"line 3: expected 1 or 2 in column 'label', got {label!r}"):
        read_preference(row(**values))


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
@pytest.mark.parametrize("stated", [False, True])
def test_prompts_of_dialogues(chosen, rejected, prompt, stated):
    # Whole dialogues stay whole dialogues where a column says what their prompt is.
    values = {"chosen": chosen, "rejected": rejected, **({"prompt": prompt} if stated else {})}
    found, one, other = read(**values)
    assert found == read_prompt(row(**values)) == Prompt(prompt)
    assert (prompt + one, prompt + other) == (chosen, rejected)


def test_a_dialogue_and_a_response_beside_it_are_refused():
    prompt = "\n\nHuman: hi\n\nAssistant:"
    with pytest.raises(ValueError, match="line 3: expected both responses to begin with the prompt, or none; 'rej"):
        read(prompt=prompt, chosen=prompt + " yes", rejected=" no")


def test_an_echo_of_the_prompt_is_a_response():
    assert read(prompt="Hello", chosen="Hello!", rejected="Hello there") == (Prompt("Hello"), "Hello!", "Hello there")


def test_texts_without_prompt_or_marker_are_read_on_request_alone():
    values = {"chosen": "the film was good", "rejected": "the film was great"}
    assert read_preference(row(**values), implicit=True).prompt == Prompt("the film was")
    assert read_prompt(row(**values), implicit=True) == Prompt("the film was")
    assert shared_prompt("good", "great", implicit=True) == ""
    for reader in (read_preference, read_prompt):
        with pytest.raises(ValueError, match=r"line 3: expected column 'prompt', got columns \['chosen', 'rejected'\]"):
            reader(row(**values))


@pytest.mark.parametrize("name", ["question", "instruction", "input", "query", "system"])
@pytest.mark.parametrize(
    "pair", [{"chosen": "yes it is", "rejected": "yes it was"}, {"chosen": FOUR, "rejected": FIVE}, {}]
)
def test_a_prompt_in_another_column_is_named_and_not_done_without(name, pair):
    message = (
        rf"line 3: expected column 'prompt', got columns \[.*{name}.*look.* like a prompt: {name}; .*prompt: {name}"
    )
    reader = read_preference if pair else read_prompt
    with pytest.raises(ValueError, match=message):
        reader(row(**pair, **{name: "What is 2+2?"}))


def test_an_empty_prompt_is_a_prompt_for_preferences_only():
    assert read(prompt="", chosen="a", rejected="b") == (Prompt(""), "a", "b")
    with pytest.raises(UnusableError, match="line 3: expected a prompt in column 'prompt', got an empty one"):
        read_prompt(row(prompt="", chosen="a", rejected="b"))


# Messages.


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": [USER], "chosen": FOUR, "rejected": FIVE},
        {"chosen": [USER, *FOUR], "rejected": [USER, *FIVE]},
        {"prompt": "Name a prime.", "chosen": FOUR, "rejected": FIVE},
        {"prompt": [USER], "chosen": "4", "rejected": "5"},
        # UltraFeedback gives the prompt as text, and again as the first message of both conversations.
        {"prompt": "Name a prime.", "chosen": [USER, *FOUR], "rejected": [USER, *FIVE]},
        {"prompt": [USER], "chosen": [USER, *FOUR], "rejected": [USER, *FIVE]},
        # Null is what another row's message has and this one lacks.
        {
            "prompt": [USER],
            "chosen": [{**USER, "name": None}, *FOUR],
            "rejected": [USER, {**FIVE[0], "tool_calls": None}],
        },
        {
            "prompt": [said("user", [{"type": "text", "text": "Name "}, {"type": "text", "text": "a prime."}])],
            "chosen": FOUR,
            "rejected": FIVE,
        },
        {"prompt": json.dumps([USER]), "chosen": json.dumps(FOUR), "rejected": json.dumps([USER, *FIVE][1:], indent=1)},
    ],
)
def test_conversations_in_every_shape_say_the_same(values):
    assert read(**values) == (Prompt([USER]), FOUR, FIVE)
    assert read_prompt(row(**values)) == Prompt([USER])


FIRST = [said("user", "Hello."), said("assistant", "Hi.")]


@pytest.mark.parametrize("before", [[], [SYSTEM], FIRST, [SYSTEM, *FIRST]])
@pytest.mark.parametrize("prompt", [None, "Name a prime.", [USER], [{**USER, "name": None}], [{**USER, "name": "Ann"}]])
def test_a_prompt_beside_whole_conversations_is_found_in_them(before, prompt):
    shared = [*before, USER]
    given = {} if prompt is None else {"prompt": prompt}
    found, chosen, rejected = read(**given, chosen=[*shared, *FOUR], rejected=[*shared, *FIVE])
    assert [(m["role"], m["content"]) for m in found.content] == [(m["role"], m["content"]) for m in shared]
    assert (chosen, rejected) == (FOUR, FIVE)


@pytest.mark.parametrize(
    "prompt", ["Name a colour.", [said("user", "Name a colour.")], [said("system", "Name a prime.")]]
)
@pytest.mark.parametrize("before", [[], [SYSTEM], FIRST])
def test_a_prompt_that_conversations_do_not_share_is_refused(before, prompt):
    shared = [*before, USER]
    with pytest.raises(ValueError, match="line 3: expected in column 'prompt' the beginning of the conversations"):
        read(prompt=prompt, chosen=[*shared, *FOUR], rejected=[*shared, *FIVE])


def test_a_prompt_of_several_messages_stands_before_responses():
    shared = [SYSTEM, *FIRST, USER]
    assert read(prompt=shared, chosen=FOUR, rejected=FIVE) == (Prompt(shared), FOUR, FIVE)


def test_conversations_that_part_at_a_user_turn_answer_the_turn_before():
    chosen, rejected = [USER, *FOUR, said("user", "x")], [USER, *FOUR, said("user", "z")]
    assert read(chosen=chosen, rejected=rejected) == (Prompt([USER]), chosen[1:], rejected[1:])


def test_a_system_column_becomes_the_first_message():
    pair = {"chosen": FOUR, "rejected": FIVE}
    for prompt in ("Name a prime.", [USER]):
        assert read(system="Be brief.", prompt=prompt, **pair)[0] == Prompt([SYSTEM, USER])
        assert (
            read(system="", prompt=prompt, **pair)[0] == read(system=None, prompt=prompt, **pair)[0] == Prompt([USER])
        )
    whole = {"chosen": [SYSTEM, USER, *FOUR], "rejected": [SYSTEM, USER, *FIVE]}
    assert read(system="Be brief.", **whole)[0] == Prompt([SYSTEM, USER])
    with pytest.raises(ValueError, match="expected column 'system' to say what the system's message says, got 'No'"):
        read(system="No", **whole)
    with pytest.raises(ValueError, match=r"beside the column 'system', got a text; .* data.columns=\{system: null\}"):
        read(system="Be brief.", prompt="p", chosen="a", rejected="b")


# Tools.


@pytest.mark.parametrize("tools", [[ADD], json.dumps([ADD]), [{**ADD, "strict": None}]])
def test_tools_are_part_of_what_is_asked(tools):
    found = read(prompt=[USER], chosen=FOUR, rejected=FIVE, tools=tools)[0]
    assert found == read_prompt(row(prompt=[USER], tools=tools)) == Prompt([USER], [ADD])
    assert found.identity != Prompt([USER]).identity
    with pytest.raises(ValueError, match=r"beside the column 'tools', got a text; .* data.columns=\{tools: null\}"):
        read(prompt="p", chosen="a", rejected="b", tools=tools)


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_no_tools_are_no_tools(tools):
    assert read(prompt=[USER], chosen=FOUR, rejected=FIVE, tools=tools)[0] == Prompt([USER])
    assert read(prompt="p", chosen="a", rejected="b", tools=tools)[0] == Prompt("p")


@pytest.mark.parametrize("content", [{}, {"content": ""}, {"content": None}])
def test_a_call_of_a_tool_is_an_answer_and_needs_no_content(content):
    call = {**CALL, **content}
    kept = {key: value for key, value in call.items() if value is not None}
    assert read(prompt=[USER], chosen=[call], rejected=FIVE) == (Prompt([USER]), [kept], FIVE)
    shared = [USER, call, said("tool", "4")]
    assert read(prompt=shared, chosen=FOUR, rejected=FIVE)[0] == Prompt([USER, kept, said("tool", "4")])


# Files.


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "stream"])
def test_every_kind_of_file_says_the_same(tmp_path, kind):
    rows = [
        {"prompt": [USER], "chosen": FOUR, "rejected": FIVE, "tools": json.dumps([ADD]), "margin": 1.5},
        {"prompt": [USER, {**CALL, "content": None}, said("tool", "4")], "chosen": FOUR, "rejected": FIVE},
    ]
    path = tmp_path / f"a.{'parquet' if kind in ('parquet', 'stream') else kind}"
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        write_jsonl(path, rows)
    found = list(iterate_rows(str(path), "k")) if kind == "stream" else load_rows(str(path), "k")
    assert [read_preference(r) for r in found] == [
        Preference(Prompt([USER], [ADD]), FOUR, FIVE, PLAIN._replace(margin=1.5)),
        Preference(Prompt([USER, CALL, said("tool", "4")]), FOUR, FIVE, PLAIN),
    ]


# What is wrong with some.

EMPTY, SAME = "a response in column '{}', got an empty one", "two different responses, got the same in"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "p", "chosen": "", "rejected": "b"}, EMPTY.format("chosen")),
        ({"prompt": "p", "chosen": "a", "rejected": " "}, EMPTY.format("rejected")),
        ({"prompt": [USER], "chosen": [said("assistant", "")], "rejected": FIVE}, EMPTY.format("chosen")),
        ({"prompt": [USER], "chosen": [], "rejected": FIVE}, EMPTY.format("chosen")),
        ({"chosen": [USER], "rejected": [USER, *FIVE]}, EMPTY.format("chosen")),
        ({"chosen": dialogue("hi", ""), "rejected": dialogue("hi", "I")}, EMPTY.format("chosen")),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, SAME),
        ({"prompt": [USER], "chosen": FOUR, "rejected": FOUR}, SAME),
        ({"prompt": [USER], "chosen": [CALL], "rejected": [{**CALL, "content": None}]}, SAME),
    ],
)
def test_pairs_that_teach_nothing_are_told_from_wrong_ones(values, message):
    with pytest.raises(UnusableError, match=re.escape("pairs.jsonl, line 3: expected " + message)):
        read_preference(row(**values))


MESSAGES = {"prompt": [USER], "rejected": FIVE}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chosen": "a"}, "expected column 'rejected', got columns ['chosen']; data.columns maps other names to ours"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "expected text or messages in column 'chosen', got 3"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "expected text or messages in column 'prompt', got 3"),
        ({"prompt": "p", "chosen": "a\ud83d", "rejected": "b"}, "expected text in column 'chosen', got half of a char"),
        (
            {"prompt": "p", "chosen": {"a": 1}, "rejected": "b"},
            "expected text or messages in column 'chosen', got dict",
        ),
        (
            {"prompt": "p" * 999, "chosen": None, "rejected": "b"},
            "expected text or messages in column 'chosen', got None",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "images": [3]}, "expected no images, since models read text"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": 10**400}, "expected a number in column 'margin'"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "[{'role': 'user', 'content': 'b'}]"},
            "expected text or messages in column 'rejected', got a text that looks like messages",
        ),
        ({**MESSAGES, "chosen": "a"}, "expected texts or messages in both 'chosen' and 'rejected', got one of each"),
        (
            {**MESSAGES, "chosen": [{"x": 1}]},
            "expected a role (text) in column 'chosen', number 1, 'role', got the keys",
        ),
        ({**MESSAGES, "chosen": ["x"]}, "expected an object in column 'chosen', number 1, got 'x'"),
        (
            {**MESSAGES, "chosen": [said("assistant", None)]},
            "expected content or tool_calls in column 'chosen', number 1",
        ),
        ({**MESSAGES, "chosen": [said("assistant", 4)]}, "expected text, parts of text or null in column"),
        (
            {**MESSAGES, "chosen": [said("", "x")]},
            "expected a role (text) in column 'chosen', number 1, 'role', got ''",
        ),
        (
            {**MESSAGES, "chosen": [said("assistant", "x\udc00")]},
            "expected text in column 'chosen', number 1, 'content'",
        ),
        ({**MESSAGES, "chosen": [said("assistant", "x", k=b"")]}, "expected values that JSON has in column 'chosen'"),
        (
            {**MESSAGES, "chosen": [said("user", [{"type": "image"}])]},
            "expected 'text', since models read nothing else,",
        ),
        ({**MESSAGES, "prompt": [], "chosen": FOUR}, "expected a prompt of at least one message, got none"),
        ({**MESSAGES, "prompt": 5, "chosen": FOUR}, "expected text or messages in column 'prompt', got 5"),
        ({**MESSAGES, "chosen": FOUR, "tools": "[1"}, "expected a list of JSON schemas, or a text of"),
        ({**MESSAGES, "chosen": FOUR, "tools": ["add"]}, "expected an object in column 'tools', number 1, got 'add'"),
        ({**MESSAGES, "chosen": FOUR, "system": 5}, "expected text in column 'system', got 5"),
    ],
)
def test_bad_preferences_are_named_in_one_line(values, message):
    with pytest.raises(ValueError, match=re.escape("pairs.jsonl, line 3: " + message)) as error:
        read_preference(row(**values))
    assert not isinstance(error.value, UnusableError)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_the_text_of_an_error_stays_short():
    with pytest.raises(ValueError, match="got columns .* and 480 more") as error:
        read_preference(row(**{f"column {i}": "x" * 1000 for i in range(500)}))
    assert len(str(error.value)) < 600


def test_values_that_are_nested_too_deeply_are_the_fault_of_their_row():
    deep = {}
    for _ in range(5000):
        deep = {"x": deep}
    with pytest.raises(ValueError, match="line 3: expected values that are nested less deeply"):
        attempt(read_preference, row(prompt=[USER], chosen=[said("assistant", "a", k=deep)], rejected=FIVE))


# Identity.


def test_identity_is_what_a_row_says():
    one = read_prompt(row(prompt=[{"content": "q", "role": "user"}]))
    assert one.identity == read_prompt(row(prompt=[said("user", "q", name=None)])).identity
    assert one.identity == read_prompt(row(prompt=json.dumps([said("user", "q")]))).identity
    assert one.identity != read_prompt(row(prompt=[said("user", "r")])).identity
    assert read_prompt(row(prompt="q")).identity == "q"
