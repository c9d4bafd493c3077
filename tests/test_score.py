"""`lit-vapo score` and `lit-vapo env`: lines in, lines out, and what a report of a fault says."""

import io
import json
import os

import pytest
import torch

from lit_vapo.cli import main
from lit_vapo.rewards import load_reward
from lit_vapo.rollout import Encoders, text_responses
from lit_vapo.types import Prompt

ROWS = [
    {"prompt": "the film", "response": " was good", "place": 7},
    {"prompt": "the film", "response": " was bad and long"},
    {"prompt": "a song", "response": " was bad", "finished": False},
]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def scored(tiny_ensemble_dir, tmp_path, capsys):
    """What is printed of a file with this text."""

    def call(text, *options, ensemble=tiny_ensemble_dir):
        file = tmp_path / "rows.jsonl"
        file.write_text(text)
        main(["score", str(ensemble), str(file), *options])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return call


@torch.no_grad()
def expected(folder, rows):
    """Scores of an ensemble that is asked in Python."""
    source = load_reward(str(folder))
    source.prepare(None)
    prompts, texts = [Prompt(row["prompt"]) for row in rows], [row["response"] for row in rows]
    return source.score(text_responses(prompts, texts, [row.get("finished", True) for row in rows], Encoders()))


def test_lines_are_printed_again_with_what_the_ensemble_says(scored, tiny_ensemble_dir):
    found, right = scored(lines(ROWS)), expected(tiny_ensemble_dir, ROWS)
    assert [{k: v for k, v in row.items() if k in ROWS[0]} for row in found] == [
        {k: v for k, v in row.items() if k in ROWS[0]} for row in ROWS
    ]
    assert found[0]["place"] == 7
    for name, value in {"reward": right.mean, "sigma": right.variance.sqrt(), "members": right.members}.items():
        torch.testing.assert_close(torch.tensor([row[name] for row in found]), value, rtol=1e-4, atol=1e-5)


def test_batches_change_nothing_and_empty_lines_are_passed_over(scored):
    whole, one_by_one = scored(lines(ROWS)), scored("\n" + lines(ROWS) + "\n\n", "--batch_size=1")
    assert len(one_by_one) == 3
    for a, b in zip(whole, one_by_one, strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-5)


def test_standard_input_will_do(tiny_ensemble_dir, monkeypatch, capsys, scored):
    from_file = scored(lines(ROWS))
    monkeypatch.setattr("sys.stdin", io.StringIO(lines(ROWS)))
    main(["score", str(tiny_ensemble_dir)])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == from_file


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"rows\.jsonl:2: expected a line of JSON with prompt and response, got "),
        ("[]", r"rows\.jsonl:2: expected an object with prompt and response, got list"),
        ('{"prompt": "x"}', r"rows\.jsonl:2: .*response"),
        ('{"prompt": 3, "response": "y"}', r"rows\.jsonl:2: .*prompt"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_scored(scored, capsys, line, said):
    with pytest.raises(ValueError, match=said):
        scored(lines(ROWS[:1]) + line + "\n")
    assert capsys.readouterr().out == ""


def test_other_bad_input_is_refused(scored, tmp_path):
    with pytest.raises(ValueError, match="--batch_size: expected at least 1, got 0"):
        scored(lines(ROWS), "--batch_size=0")
    with pytest.raises(ValueError, match="nowhere"):
        scored(lines(ROWS), ensemble=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        main(["score", "x", str(tmp_path / "none.jsonl")])


def test_env_says_versions_and_nothing_of_whose_machine_it_is(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    main(["env"])
    text = capsys.readouterr().out
    assert all(f"\n{name} " in "\n" + text for name in ("lit-vapo", "torch", "lightning", "vllm", "python", "CUDA"))
    assert torch.__version__ in text
    assert "k" * 40 not in text
    assert os.getcwd() not in text
