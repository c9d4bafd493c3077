"""`data show`: every token in its place and told from the others without colour, and counts of a whole file."""

import io
import re

import pytest
from helpers import tiny_tokenizer, write_jsonl

from lit_vapo.cli import main
from lit_vapo.data.encoder import Encoder
from lit_vapo.data.row import Row
from lit_vapo.data.show import Marks, Summary, Viewer, show

USER = {"role": "user", "content": "the film was"}


def said(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("show"), chat_template=True)


def shown(tokenizer, rows, count=9, max_length=100, width=100, **options):
    encoder = Encoder(tokenizer, **options)
    summary = Summary(encoder, max_length, 9)
    numbered = [Row(row, f"line {i}") for i, row in enumerate(rows, 1)]
    lines = show(numbered, summary, Viewer(encoder, max_length, Marks(), width), count)
    return [line.plain.rstrip() for line in lines]


def test_tokens_stand_above_their_ids(tokenizer):
    lines = shown(tokenizer, [{"prompt": "the film", "chosen": " was good", "rejected": " was\nbad", "margin": 2}])
    ids = tokenizer.convert_tokens_to_ids
    assert lines[:2] == ["line 1, margin 2", "  prompt: 2 tokens"]
    assert lines[2].split() == ["the", "·film"]
    assert [int(i) for i in lines[3].split()] == [ids("the"), ids("Ġfilm")]
    assert lines[4] == "  chosen: 3 tokens, ends with «<eos>»"
    assert lines[5].split() == ["·was", "·good", "«<eos>»"]
    # A token and its id begin in one column.
    starts = [[word.start() for word in re.finditer(r"\S+", line)] for line in lines[5:7]]
    assert starts[0] == starts[1]
    assert "\\n" in lines[8].split()


def test_control_tokens_of_a_template_are_told_from_text_that_names_them(tokenizer):
    row = {"prompt": [USER], "chosen": said("good <eos>"), "rejected": said("bad")}
    prompt, chosen = (shown(tokenizer, [row], width=1000)[i].split() for i in (2, 5))
    assert prompt[0] == "«<bos>»"
    assert [token for token in chosen if "«" in token] == ["«<eos>»"]
    assert "<" in chosen


def test_what_is_cut_is_marked(tokenizer):
    row = {"prompt": "the film was", "chosen": " good", "rejected": " bad" * 5}
    lines = shown(tokenizer, [row], max_length=7)
    assert lines[1] == "  prompt: 3 tokens, 2 of them cut off"
    assert lines[2].split() == ["(the)", "(·film)", "·was"]
    assert lines[4].startswith("  chosen: 2 tokens, ends with")
    lines = shown(tokenizer, [row], max_length=4)
    assert lines[7] == "  rejected: 6 tokens, 3 of them cut off, its end is cut off"
    assert lines[8].split() == ["·bad"] * 3 + ["(·bad)"] * 2 + ["(«<eos>»)"]


def test_a_beginning_of_sequence_that_stays_is_not_marked(tokenizer):
    lines = shown(
        tokenizer, [{"prompt": [USER], "chosen": said("good"), "rejected": said("bad")}], max_length=9, width=999
    )
    tokens = lines[2].split()
    assert tokens[0] == "«<bos>»"
    assert tokens[1].startswith("(")
    assert tokens[-1] == ":"


def test_lines_are_as_wide_as_the_terminal(tokenizer):
    lines = shown(tokenizer, [{"prompt": "the film was good " * 20, "chosen": "a", "rejected": "b"}], width=40)
    assert max(map(len, lines[:-10])) <= 40


def test_prompts_are_shown_too(tokenizer):
    lines = shown(tokenizer, [{"prompt": "the film"}, {"prompt": [USER]}, {"prompt": ""}])
    assert lines[1] == "  prompt: 2 tokens"
    assert lines[-5:] == [
        "3 rows, 1 of them with problems",
        "  1 × an empty prompt; the first: line 3",
        "tokens                         median    95%   most",
        "  prompt                          11     20     20",
        "  prompts longer than max_prompt_length = 9: 1",
    ]


def test_problems_are_counted_by_kind_with_the_first_of_each(tokenizer):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows = [good, {**good, "chosen": ""}, {**good, "chosen": 3}, {**good, "chosen": 4}, {**good, "rejected": "a"}]
    lines = shown(tokenizer, rows, count=0)
    assert lines[0] == "5 rows, 4 of them with problems"
    assert sorted(lines[1:4]) == [
        "  1 × an empty response; the first: line 2",
        "  1 × two equal responses; the first: line 5",
        "  2 × expected text or messages in column 'chosen'; the first: line 3, got 3",
    ]


def test_lengths_cuts_boundaries_and_ends_are_counted(tokenizer):
    rows = [
        {"prompt": "the film", "chosen": " was good", "rejected": " was bad"},
        # "film" is one token: it reaches over the boundary, and is part of the response.
        {"prompt": "the fi", "chosen": "lm was", "rejected": "lm bad bad bad"},
    ]
    lines = shown(tokenizer, rows, count=0, max_length=4, append_eos=False)
    assert lines[0] == "2 rows, 0 of them with problems"
    table = {line[:29].strip(): line[29:].split() for line in lines[2:6]}
    assert table["chosen"] == ["2", "2", "2"]
    assert table["prompt and longer response"] == ["4.5", "5", "5"]
    assert lines[6:] == [
        "  prompts longer than max_prompt_length = 9: 0",
        "  cut at max_length = 4: 0 prompts, 1 responses",
        "  prompt and response share a token at the boundary: 1 of 2",
        "  responses without an end: 4 of 4",
    ]


def test_no_sound_row_leaves_the_problems(tokenizer):
    assert shown(tokenizer, [{"prompt": 3}]) == [
        "1 rows, 1 of them with problems",
        "  1 × expected text or messages in column 'prompt'; the first: line 1, got 3",
    ]


@pytest.mark.parametrize(("encoding", "space"), [("utf-8", "·"), ("latin-1", "·"), ("ascii", "_"), ("cp437", "·")])
def test_marks_are_those_that_the_terminal_can_show(encoding, space):
    marks = Marks.of(encoding)
    assert marks.space == space
    "".join([marks.space, *marks.control, *marks.cut]).encode(encoding)


# The command.


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_the_command_prints_in_any_encoding(tokenizer, tmp_path, monkeypatch, encoding):
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "ñ €", "chosen": "a", "rejected": "b"}])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    monkeypatch.setattr("sys.stdout", out)
    main(["data", "show", file, "--tokenizer", str(tmp_path / "tokenizer"), "--columns", "{prompt: question}"])
    out.flush()
    text = out.buffer.getvalue().decode(encoding)
    assert re.search(r"  prompt: \d+ tokens\n", text)
    assert "1 rows, 0 of them with problems" in text


def test_the_command_refuses_what_is_no_file(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="FILE: expected a file, got './gone.jsonl', which does not exist"):
        main(["data", "show", "./gone.jsonl", "--tokenizer", str(tmp_path / "tokenizer")])
