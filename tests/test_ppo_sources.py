"""`ppo` through the command line with a function, and with a sum of an exported ensemble and a function."""

import csv
import shutil
import sys

import helpers
import hostile_helpers
import public_helpers
import pytest
import torch
import yaml

from lit_vapo.callbacks.samples import _table
from lit_vapo.cli import main
from lit_vapo.stages.ppo import module as ppo
from lit_vapo.stages.ppo.module import PPOModule

FUNCTION = "lit_vapo.rewards.function.FunctionReward"
CODE = """
def answered(completions, answer, **kwargs):
    pairs = zip(completions, answer, strict=True)
    return [[float(given in text) + 0.1 * len(text), len(text.encode()) ** 0.5] for text, given in pairs]


def length(completions):
    return [0.1 * len(text) for text in completions]
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """A file of prompts with further columns."""
    rows = [{"prompt": f"Review {i}: the film", "answer": "aeiou"[i % 5], "level": i} for i in range(16)]
    return helpers.write_jsonl(tmp_path_factory.mktemp("answers") / "prompts.jsonl", rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the user's functions, from which commands are given."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "own_rewards.py").write_text(CODE)
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.syspath_prepend(str(folder))
    yield folder
    patch.undo()
    sys.modules.pop("own_rewards", None)


def write(path, reward):
    path.write_text(yaml.safe_dump({"model": {"reward": reward}}))
    return str(path)


@pytest.fixture(scope="module")
def function_run(place, stage_args, answers):
    """A run with two members from a function, by options of the command line."""
    main(
        stage_args(
            "ppo",
            "fit",
            place / "function",
            f"--model.reward.class_path={FUNCTION}",
            "--model.reward.init_args.function=own_rewards:answered",
            "--model.reward.init_args.num_members=2",
            data__prompts=answers,
        )
    )
    return place / "function"


@pytest.fixture(scope="module")
def function_config(place):
    """The same in a file."""
    settings = {"function": "own_rewards:answered", "num_members": 2}
    return write(place / "function.yaml", {"class_path": FUNCTION, "init_args": settings})


@pytest.fixture(scope="module")
def sum_config(place, tiny_ensemble_dir):
    """A sum of an ensemble, by a path from where the run starts, and a function."""
    shutil.copytree(tiny_ensemble_dir, place / "ensemble")
    sources = {
        "ensemble": "ensemble",
        "length": {"class_path": FUNCTION, "init_args": {"function": "own_rewards.length"}},
    }
    settings = {"sources": sources, "weights": {"length": -0.5}}
    return write(place / "sum.yaml", {"class_path": "lit_vapo.rewards.combined.WeightedSum", "init_args": settings})


@pytest.fixture(scope="module")
def sum_run(place, stage_args, answers, sum_config):
    """A run with that sum."""
    main(stage_args("ppo", "fit", place / "sum", f"--config={sum_config}", data__prompts=answers))
    return place / "sum"


def logged(run):
    """All figures of a run, by key."""
    found = {}
    for file in sorted(run.glob("logs/version_*/metrics.csv")):
        for row in csv.DictReader(file.read_text().splitlines()):
            found |= {key: float(value) for key, value in row.items() if value}
    return found


def test_a_sum_logs_its_parts(sum_run):
    figures = logged(sum_run)
    for split in ("train", "val"):
        parts = [figures[f"{split}/reward_{name}"] for name in ("ensemble", "length")]
        assert figures[f"{split}/reward_mean"] == pytest.approx(parts[0] - 0.5 * parts[1], rel=1e-5)
        # The function is taken as exact.
        assert figures[f"{split}/sigma_ensemble"] == pytest.approx(figures[f"{split}/ensemble_sigma"], rel=1e-5)
        assert figures[f"{split}/sigma_ensemble"] > 0
        assert f"{split}/sigma_length" not in figures


def test_records_have_parts_and_columns(sum_run, answers):
    known = {row["prompt"]: row for row in helpers.read_jsonl(helpers.Path(answers))}
    records = helpers.read_jsonl(sum_run / "samples_val.jsonl")
    assert records
    for record in records:
        row = known[record["prompt"]]
        assert record["columns"] == {"answer": row["answer"], "level": row["level"]}
        assert record["reward_length"] == pytest.approx(0.1 * len(record["response"]), rel=1e-6)
        assert record["reward"] == pytest.approx(record["reward_ensemble"] - 0.5 * record["reward_length"], abs=1e-5)
        assert len(record["members"]) == 3


def test_an_ensemble_a_function_and_public_models_together(place, sum_run, stage_args, answers, tmp_path):
    models = [{"path": public_helpers.classifier(tmp_path / name, seed=i)} for i, name in enumerate("ab")]
    reward = yaml.safe_load((place / "sum.yaml").read_text())["model"]["reward"]
    reward["init_args"]["sources"]["public"] = {"class_path": "PretrainedRewards", "init_args": {"models": models}}
    config = write(tmp_path / "all.yaml", reward)
    main(stage_args("ppo", "fit", tmp_path / "run", f"--config={config}", data__prompts=answers))
    figures = logged(tmp_path / "run")
    assert {f"train/reward_{name}" for name in ("ensemble", "length", "public")} <= figures.keys()
    records = helpers.read_jsonl(tmp_path / "run" / "samples_val.jsonl")
    for record in records:
        # Independent: the variances add, and no member is common.
        expected = (record["sigma_ensemble"] ** 2 + record["sigma_public"] ** 2) ** 0.5
        assert record["sigma"] == pytest.approx(expected, rel=1e-4)
        assert record["members"] == []
    options = {"data__prompts": answers, "ckpt_path": helpers.last(tmp_path / "run")}
    main(stage_args("ppo", "validate", tmp_path / "again", f"--config={config}", **options))
    again = helpers.read_jsonl(tmp_path / "again" / "samples_val.jsonl")
    assert [{**record, "step": 0} for record in records] == [{**record, "step": 0} for record in again]


@pytest.mark.parametrize("name", ["function", "sum"])
def test_a_checkpoint_scores_as_its_run_did(
    name, function_run, function_config, sum_run, sum_config, stage_args, answers, tmp_path, capsys
):
    run = {"function": function_run, "sum": sum_run}[name]
    options = {"data__prompts": answers, "ckpt_path": helpers.last(run)}
    reward = f"--config={sum_config if name == 'sum' else function_config}"
    capsys.readouterr()
    main(stage_args("ppo", "validate", tmp_path / "again", reward, **options))
    # The unit of the variance came with the checkpoint.
    assert "calibrating" not in capsys.readouterr().out
    then, now = (helpers.read_jsonl(x / "samples_val.jsonl") for x in (run, tmp_path / "again"))
    assert [{**record, "step": 0} for record in then] == [{**record, "step": 0} for record in now]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_is_resumed(function_run, function_config, stage_args, answers, tmp_path, capsys):
    shutil.copytree(function_run, tmp_path / "run")
    args = {"data__prompts": answers, "ckpt_path": helpers.last(tmp_path / "run"), "trainer__max_epochs": 2}
    main(stage_args("ppo", "fit", tmp_path / "run", f"--config={function_config}", **args))
    assert "calibrating" not in capsys.readouterr().out
    assert logged(tmp_path / "run")["train/iteration"] == 4
    before, after = (
        torch.load(helpers.last(x), weights_only=True)["state_dict"] for x in (function_run, tmp_path / "run")
    )
    kept = [key for key in before if key.startswith("reward.normaliser.")]
    assert len(kept) == 4
    assert all(torch.equal(before[key], after[key]) for key in kept)


def test_an_export_runs_nothing_of_the_user_s(function_run, sum_run, tmp_path, monkeypatch, capsys):
    # From elsewhere, without the function.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [x for x in sys.path if "place" not in x])
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    for run in (function_run, sum_run):
        output = tmp_path / run.name
        main(["export", f"--checkpoint={helpers.last(run)}", f"--output={output}"])
        assert "model.reward was" not in capsys.readouterr().out
        assert "rewards from `" in (output / "README.md").read_text()
    assert "own_rewards" not in sys.modules


def test_a_checkpoint_does_not_say_whom_its_reward_trusts(tiny_model_dir, tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text(hostile_helpers.EVIL.format(marker=str(tmp_path / "marker")))
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = hostile_helpers.ensemble(tmp_path / "e", tiny_model_dir)
    hostile_helpers.edit(folder / "ensemble.json", head__class_path="trap.Evil")
    init_args = {"folder": str(folder), "trust": ["trap"]}
    one = {"class_path": "lit_vapo.rewards.ensemble.EnsembleReward", "init_args": init_args}
    both = {"class_path": "lit_vapo.rewards.combined.WeightedSum", "init_args": {"sources": {"a": one}}}
    for reward in (one, both):
        path = hostile_helpers.checkpoint(tmp_path / "x.ckpt", "ppo", base={"path": tiny_model_dir}, reward=reward)
        with pytest.raises(ValueError, match="expected classes of lit_vapo, got class_path 'trap.Evil'"):
            main(["export", f"--checkpoint={path}", f"--output={tmp_path / 'out'}"])
    assert not (tmp_path / "marker").exists()


# What is refused before a model is loaded.


@pytest.fixture
def unloaded(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(ppo, "ActorCritic", load)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"function": "own_rewards:longth", "num_members": 2}, "expected a function that can be imported"),
        (
            {"function": "own_rewards:answered", "num_members": 2},
            r"line 1: expected a column 'answer' .* since the reward is computed from it, got none besides the prompt",
        ),
        (
            {"function": "own_rewards:length"},
            "objective VarianceAware needs the variance .* expected at least 2 members",
        ),
    ],
)
def test_what_is_missing_is_told_before_models_are_loaded(options, message, place, stage_args, tmp_path, unloaded):
    config = write(tmp_path / "reward.yaml", {"class_path": FUNCTION, "init_args": options})
    with pytest.raises(ValueError, match=message):
        main(stage_args("ppo", "fit", tmp_path / "run", f"--config={config}"))


def test_what_goes_wrong_in_an_iteration_names_it(place, stage_args, tmp_path, monkeypatch, answers):
    import own_rewards

    config = write(tmp_path / "reward.yaml", {"class_path": FUNCTION, "init_args": {"function": "own_rewards:length"}})
    monkeypatch.setattr(own_rewards, "length", lambda completions: [float("nan")] * len(completions))
    objective = "--model.objective=lit_vapo.objectives.mean_reward.MeanReward"
    message = (
        "iteration 1: reward function own_rewards:length: expected finite numbers or None, got nan for prompt 'Rev"
    )
    with pytest.raises(ValueError, match=message):
        main(stage_args("ppo", "fit", tmp_path / "run", f"--config={config}", objective, data__prompts=answers))


def test_the_module_is_made_without_the_function(tiny_model_dir):
    from lit_vapo.models.pretrained import Pretrained
    from lit_vapo.rewards import FunctionReward

    made = PPOModule(Pretrained(tiny_model_dir), FunctionReward("no_such_module:length", 2))
    assert made.reward.num_members == 2


def test_tables_have_a_cell_for_each_column_of_any_row():
    records = [{"response": "one", "members": [1.0]}, {"response": "two", "columns": {"answer": [4]}, "members": [2.0]}]
    columns, rows = _table(records)
    assert columns == ["response", "columns", "member_0"]
    assert rows == [["one", None, 1.0], ["two", '{"answer": [4]}', 2.0]]
