"""`lit-vapo chat`: lines in, answers out, beside the reference and an ensemble."""

import io
import re

import helpers
import pytest
from transformers import AutoTokenizer

from lit_vapo.cli import main
from lit_vapo.commands import chat
from lit_vapo.models.answers import Answer


@pytest.fixture(scope="module")
def policy(ppo_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "exported"
    main(["export", f"--checkpoint={helpers.last(ppo_run)}", f"--output={folder}"])
    return folder


@pytest.fixture
def talked(monkeypatch, capsys):
    """What is printed when these lines are typed."""

    def call(lines, *options):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        main(["chat", *map(str, options), "--sampling.max_new_tokens=6", "--seed=1"])
        return capsys.readouterr().out

    return call


def test_each_line_is_answered_and_the_same_seed_says_the_same(policy, talked):
    once = talked(["the film was", "", "and"], policy)
    assert len(once.strip("\n").splitlines()) >= 1
    assert talked(["the film was", "", "and"], policy) == once
    assert "reference:" not in once


def test_reference_and_ensemble_stand_beside_the_answers(policy, tiny_ensemble_dir, talked):
    text = talked(["the film was"], policy, "--reference=true", f"--ensemble={tiny_ensemble_dir}")
    assert [line for line in text.splitlines() if line in ("policy:", "reference:")] == ["policy:", "reference:"]
    assert len(re.findall(r"^\[[+-]\d+\.\d\d ± \d+\.\d\d\]$", text, re.M)) == 2


def test_several_answers_are_numbered_each_with_its_opinion(policy, tiny_ensemble_dir, talked):
    text = talked(["the film was"], policy, "--sampling.num_responses=3", f"--ensemble={tiny_ensemble_dir}")
    assert re.findall(r"^(\d)\. \[[+-]\d+\.\d\d ± \d+\.\d\d\] ", text, re.M) == ["1", "2", "3"]


def test_a_conversation_goes_on_with_the_first_answer_and_may_begin_anew(tiny_model_dir, talked, monkeypatch):
    asked = []
    draw = chat.Talk._draw

    def watched(self, lm, prompt, name):
        asked.append([(m["role"], m["content"]) for m in prompt.content])
        return draw(self, lm, prompt, name)

    monkeypatch.setattr(chat.Talk, "_draw", watched)
    text = talked(["one", "two", "/new", "three"], tiny_model_dir, "--sampling.num_responses=2")
    first = re.findall(r"^1\. (.*)$", text, re.M)
    assert [len(messages) for messages in asked] == [1, 3, 1]
    assert [m for m in asked[1] if m[0] == "user"] == [("user", "one"), ("user", "two")]
    assert asked[1][1][0] == "assistant"
    assert chat.plain(asked[1][1][1]).splitlines()[:1] in ([first[0]], [])
    assert asked[2] == [("user", "three")]


def test_a_text_is_continued_without_a_template(tmp_path, talked, monkeypatch):
    folder = tmp_path / "plain"
    path = helpers.tiny_model(folder, helpers.tiny_tokenizer(folder))
    assert AutoTokenizer.from_pretrained(path).chat_template is None
    asked = []
    monkeypatch.setattr(
        chat.Talk, "_draw", lambda self, lm, prompt, name: asked.append(prompt.content) or [Answer("x", True)]
    )
    talked(["one", "two"], path)
    assert asked == ["one", "two"]


def test_what_a_model_writes_does_not_act_on_the_terminal():
    assert chat.plain("a\x1b[31mb\n\tc\x07é") == "a\\x1b[31mb\n\tc\\x07é"


def test_bad_input_is_one_message(policy, tiny_model_dir, talked, tmp_path):
    with pytest.raises(ValueError, match=r"--base: expected the reference of .*, which is a whole model, got none"):
        talked(["x"], tiny_model_dir, "--reference=true")
    with pytest.raises(ValueError, match="nowhere"):
        talked(["x"], tmp_path / "nowhere")
    both = talked(["x"], tiny_model_dir, "--reference=true", f"--base={tiny_model_dir}")
    assert "reference:" in both


def test_an_option_is_found_by_its_last_part(tmp_path, capsys):
    for given in ("--max_new_tokens", "--max_new_token"):
        with pytest.raises(SystemExit):
            chat.main([str(tmp_path), given, "20"])
        assert "\nDid you mean --sampling.max_new_tokens?\n" in capsys.readouterr().err
