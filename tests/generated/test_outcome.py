"""How generated inputs are judged: each fault is one, and a hang ends."""

import json
import time

import pytest
from hypothesis import strategies as st

from lit_vapo.rewards.ensemble_file import read_config
from tests.generated import processes
from tests.generated.outcome import ACCEPTED, DEEP, HANG, REFUSED, UNCLEAR, WRONG, Kind, WrongError, outcome, refusal
from tests.generated.texts import ALPHABET, ids_to_bytes
from tests.helpers import tiny_tokenizer


def nothing(case, folder):
    """Right."""


def wrong(case, folder):
    raise WrongError("other tokens")


def deep(case, folder):
    return json.loads("{")


def refused(case, folder):
    return read_config(folder)


def asleep(case, folder):
    if case:
        time.sleep(60)


@pytest.mark.parametrize(("check", "word"), [(nothing, ACCEPTED), (wrong, WRONG), (deep, DEEP), (refused, REFUSED)])
def test_each_outcome_has_its_word(check, word):
    found = outcome(Kind("some", st.none(), check), None)
    assert found.word == word
    assert found.fault == (word in (WRONG, DEEP))


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("rows.jsonl, line 2: expected a JSON object, got a list", REFUSED),
        ("data.max_length: expected at least 2, got 1", REFUSED),
        ("data.max_length: expected at least 2, got 1\nAll options: lit-vapo reward fit --help", REFUSED),
        ("", UNCLEAR),
        ("expected something else", UNCLEAR),
        ("line 2: expected" + "\nlines" * 30, UNCLEAR),
        ("line 2: " + "x" * 2000, UNCLEAR),
        ("x.json: cannot be read, pass weights_only=False", UNCLEAR),
    ],
)
def test_a_refusal_is_short_and_says_where(said, word, tmp_path):
    assert refusal(f"noise\nlit-vapo: error: {said}\n", tmp_path).word == word


def test_bytes_of_tokens_are_those_of_the_text(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    text = "the film 🙂 \x00é\n\ufeff"
    assert sorted(ALPHABET.values()) == list(range(256))
    assert ids_to_bytes(tokenizer, tokenizer(text)["input_ids"]) == text.encode()
    assert ids_to_bytes(tokenizer, [tokenizer.eos_token_id]) == b"<eos>"


def test_what_takes_too_long_is_ended_and_the_rest_is_tried(monkeypatch):
    monkeypatch.setattr(processes, "KINDS", [Kind("asleep", st.booleans(), asleep)])
    monkeypatch.setattr(processes, "SECONDS", 2)
    monkeypatch.setattr(processes, "START", 30)
    # Threads in place of processes would not end; forks know of the changes above.
    monkeypatch.setattr(processes, "METHOD", "fork")
    words = [word for word, _, _ in processes.results(0, 2, 0)]
    assert sorted(words) == [HANG, ACCEPTED]
