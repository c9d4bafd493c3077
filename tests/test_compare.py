"""`lit-vapo compare`: two policies, the same prompts, and who wins."""

import re

import helpers
import pytest

from lit_vapo.cli import main
from lit_vapo.commands import compare


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "model"
    return helpers.tiny_model(folder, helpers.tiny_tokenizer(folder, chat_template=True), seed=1)


@pytest.fixture
def compared(tiny_prompts_file, capsys):
    """What is printed of two policies."""

    def call(*words):
        given = ("--sampling.max_new_tokens=6", f"--prompts={tiny_prompts_file}")
        main(["compare", *map(str, words[:2]), *given, *map(str, words[2:])])
        return capsys.readouterr().out

    return call


def test_a_run_answers_as_its_export_does_and_no_policy_beats_itself(
    ppo_run, tiny_ensemble_dir, tmp_path, compared, capsys
):
    main(["export", f"--checkpoint={helpers.last(ppo_run)}", f"--output={tmp_path / 'policy'}"])
    capsys.readouterr()
    words = (f"--output={tmp_path / 'answers.jsonl'}", f"--reward={tiny_ensemble_dir}", "--num_prompts=5")
    text = compared(ppo_run, tmp_path / "policy", *words)
    records = helpers.read_jsonl(tmp_path / "answers.jsonl")
    assert [r["policy"] for r in records] == [str(ppo_run)] * 5 + [str(tmp_path / "policy")] * 5
    ours, theirs = (
        [{k: v for k, v in r.items() if k != "policy"} for r in part] for part in (records[:5], records[5:])
    )
    assert ours == theirs
    assert len({r["response"] for r in ours}) > 1
    assert all(len(r["members"]) == 3 for r in ours)
    # 5 of 10 halves won: Wilson's interval of ½ in 5 cases is ½ ± 0.33.
    assert (
        "A's win rate over B is 50% (95% interval 17% … 83%). Its gain is +0.00, with a standard error of 0.00." in text
    )
    assert "5 prompts, one answer to each" in text


def test_the_better_one_wins(tiny_model_dir, other_model, compared, monkeypatch, tmp_path):
    file = tmp_path / "letter_rewards.py"
    file.write_text("def letter(completions, **kwargs):\n    return [float(len(text)) for text in completions]\n")
    monkeypatch.chdir(tmp_path)
    reward = ("--reward=FunctionReward", "--reward.function=letter_rewards.letter", "--sampling.num_responses=2")
    text = compared(tiny_model_dir, other_model, *reward, f"--output={tmp_path / 'answers.jsonl'}")
    records = helpers.read_jsonl(tmp_path / "answers.jsonl")
    a, b = records[: len(records) // 2], records[len(records) // 2 :]
    assert [(r["prompt_id"], r["response_number"]) for r in a] == [(r["prompt_id"], r["response_number"]) for r in b]
    assert all(r["reward"] == len(r["response"]) and r["sigma"] is None for r in records)
    # Each of two answers against each of two, by prompt.
    pairs = [(x["reward"], y["reward"]) for i in range(0, len(a), 2) for x in a[i : i + 2] for y in b[i : i + 2]]
    won = sum((x > y) + 0.5 * (x == y) for x, y in pairs) / len(pairs)
    assert f"A's win rate over B is {won:.0%} " in text


def test_answers_stand_side_by_side_as_plain_text(tiny_model_dir, other_model, compared):
    text = compared(tiny_model_dir, other_model, "--num_prompts=4")
    assert [int(number) for number in re.findall(r"^Review (\d+):", text, re.M)] == list(range(compare.SHOWN))
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "win rate" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("{model}", "nowhere/at/all"), r"policy: expected .*nowhere/at/all"),
        (
            ("{model}", "{reward}"),
            r"reward: expected a policy, or a run of the ppo or the sft stage, got one of 'reward'",
        ),
        (("{model}", "{model}", "--num_prompts=0"), "--num_prompts: expected at least 1, got 0"),
        (("{model}", "{model}", "--prompts=none.jsonl"), "--prompts: expected a file, got 'none.jsonl'"),
        (("{model}", "{model}", "--reward=nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_message(words, said, tiny_model_dir, reward_run, compared):
    with pytest.raises(ValueError, match=said):
        compared(*(word.format(model=tiny_model_dir, reward=reward_run) for word in words))


def test_prompts_without_a_reward_are_left_out():
    def record(prompt, reward):
        told = {"reward": reward, "sigma": None, "members": None}
        return {"prompt_id": prompt, "prompt": "p", "response": "r", "stopped": True, "length": 2, **told}

    ours, theirs = [record(0, 2.0), record(1, None), record(2, 1.0)], [record(0, 1.0), record(1, 5.0), record(2, 0.0)]
    said = compare._figures([ours, theirs])[1]
    # Two wins of two: Wilson's interval begins at 2 / (2 + 1.96²) = 0.342.
    assert said == (
        "A's win rate over B is 100% (95% interval 34% … 100%). Its gain is +1.00, with a standard error of 0.00. 1 "
        "prompts are left out: their answers have no reward."
    )
    nothing = [[record(0, None)], [record(0, 1.0)]]
    assert compare._figures(nothing)[1] == "The rewards say nothing of these answers."
