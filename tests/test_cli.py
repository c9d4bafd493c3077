"""The command line: what it says, finds and exports, and how it guards the folder of a run."""

import importlib
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from helpers import CONFIGS, last
from hostile_helpers import checkpoint
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_vapo import __version__
from lit_vapo.cli import COMMANDS, STAGES, Command, main
from lit_vapo.rewards.reward_model import RewardModel

# Words.

REWARD = r"reward fit, reward validate, reward test, reward join, .* or reward \w+"


def test_usage(capsys):
    for words in ([], ["--help"], ["-h"]):
        main(words)
        text = capsys.readouterr().out
        assert text.startswith("usage: lit-vapo STAGE COMMAND [options]")
        assert all(f"\n  {word} " in text for word in (*STAGES, "export"))


def test_an_unknown_stage_is_refused():
    known = "sft, reward, ppo, plan, export, report, chat, compare, score, data, completion, env, convert or study"
    message = f"expected a stage or command: {known}, got 'dpo'\nAll of them"
    with pytest.raises(ValueError, match=message):
        main(["dpo", "fit"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reward"], f"{REWARD}, got 'reward'"),
        (["reward", "train"], f"{REWARD}, got 'reward train'"),
        (["ppo", "join"], "ppo fit, ppo validate, ppo test or ppo predict, got 'ppo join'"),
        (["study"], "study run or study report, got 'study'"),
        (["data", "shwo", "file"], "data show, got 'data shwo'"),
    ],
)
def test_a_first_word_wants_a_second(words, said):
    with pytest.raises(ValueError, match=f"^expected {said}\nAll of them: lit-vapo {words[0]} --help$"):
        main(words)


@pytest.mark.parametrize("word", ["sft", "reward", "ppo", "study", "data"])
def test_a_first_word_says_what_it_has(word, capsys):
    main([word, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: lit-vapo {word} COMMAND")
    for name, command in COMMANDS.items():
        assert (f"\n  {name} " in text) == (name.split()[0] == word)
        if name == word:
            assert f"({', '.join(command.parts)})" in text


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if not command.parts])
def test_every_command_of_the_table_runs_what_it_names(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([*name.split(), "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: lit-vapo {name} ")


def test_a_command_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "my_command.py").write_text("def greet(name: str, times: int = 1) -> None:\n    print(name * times)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(COMMANDS, "reward greet", Command("reward greet", "say it", "my_command:greet"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    main(["reward", "greet", "--name=a", "--times=3"])
    assert capsys.readouterr().out == "aaa\n"
    with pytest.raises(ValueError, match="or reward greet, got 'reward train'"):
        main(["reward", "train"])


def test_a_package_that_comes_with_an_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "joblib", None)
    for module in ("command", "execution"):
        monkeypatch.delitem(sys.modules, f"lit_vapo.study.{module}", raising=False)
    with pytest.raises(ValueError, match=r"lit-vapo study run needs joblib: pip install 'lit-vapo\[study\]'"):
        main(["study", "run"])


def test_the_version_is_that_of_the_package(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"lit-vapo {__version__}\n"


@pytest.mark.parametrize("words", [["--help"], ["ppo", "fit", "--help"]])
def test_help_answers_without_loading_torch(words):
    code = f"import sys; from lit_vapo.cli import main; main({words}); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "usage: lit-vapo" in done.stdout


def test_the_model_s_path_is_given_once(stage_args, tmp_path, tiny_model_dir):
    reference = ("--model.reference=base", "--model.reference_sampling.max_new_tokens=6", "--model.num_reference=12")
    words = stage_args("reward", "fit", tmp_path / "run", *reference)
    main([word for word in words if not word.startswith("--data.tokenizer")])
    saved = yaml.safe_load((tmp_path / "run/logs/version_0/config.yaml").read_text())
    assert saved["data"]["tokenizer"] == str(tiny_model_dir)
    ensemble = tmp_path / "ensemble"
    main(["export", f"--checkpoint={tmp_path}/run/checkpoints/last.ckpt", f"--output={ensemble}"])
    # Members that saw no reference are not calibrated.
    assert RewardModel.from_pretrained(ensemble).head.calibrated


def test_export_explains_its_options(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    text = capsys.readouterr().out
    assert "usage: lit-vapo export" in text
    assert "A checkpoint of any stage." in text
    with pytest.raises(SystemExit):
        main(["export", "--output=somewhere"])
    error = capsys.readouterr().err
    assert "required" in error
    assert "checkpoint" in error


# Classes of one's own.


OWN_HEAD = '''
import torch
import yaml
from lit_vapo.functional import bradley_terry_loss
from lit_vapo.rewards.members.base import RewardHead


class Paired(RewardHead):
    """Two members.

    Args:
        spread: How far apart they begin.
    """

    def __init__(self, spread: float = 1.0) -> None:
        super().__init__(2)
        self.spread = spread

    def make_parameters(self, hidden_size):
        self.weight = torch.nn.Parameter(torch.linspace(-self.spread, self.spread, 2 * hidden_size).view(2, -1))

    def rewards(self, features):
        return features @ self.weight.T

'''


def test_an_estimator_beside_you_trains_exports_and_loads(stage_args, tmp_path, monkeypatch):
    (tmp_path / "my_own_head.py").write_text(OWN_HEAD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    own = ("--model.head=my_own_head.Paired", "--model.head.spread=0.5")
    main(stage_args("reward", "fit", tmp_path / "run", *own))
    words = ["export", f"--checkpoint={last(tmp_path / 'run')}", f"--output={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match=r"got class_path 'my_own_head.Paired', .* --trust='\[my_own_head.Paired\]'"):
        main(words)
    main([*words, "--trust=[my_own_head.Paired]"])
    with pytest.raises(ValueError, match=r"ensemble.json: expected classes of lit_vapo, got class_path 'my_own_head"):
        RewardModel.from_pretrained(tmp_path / "out")
    head = RewardModel.from_pretrained(tmp_path / "out", trust=["my_own_head"]).head
    assert isinstance(head, importlib.import_module("my_own_head").Paired)
    assert head.spread == 0.5
    saved = torch.load(last(tmp_path / "run"), weights_only=True)["state_dict"]
    torch.testing.assert_close(head.weight, saved["head.weight"])


def test_a_class_that_is_not_there_is_named(stage_args, tmp_path, capsys, untrained):
    with pytest.raises(SystemExit):
        main(stage_args("reward", "fit", tmp_path / "run", "--model.head=nowhere.Head"))
    assert "nowhere" in capsys.readouterr().err


# Export.


def test_an_exported_sft_model_is_an_ordinary_folder(sft_run, tmp_path, capsys):
    main(["export", f"--checkpoint={last(sft_run)}", f"--output={tmp_path / 'out'}"])
    assert f"exported the sft checkpoint to {tmp_path / 'out'}" in capsys.readouterr().out
    weights = torch.load(last(sft_run), weights_only=True)["state_dict"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in weights.items():
        (key,) = (k for k in model if name.endswith("." + k))
        torch.testing.assert_close(model[key], weight, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_an_exported_ensemble_has_its_members(tiny_ensemble_dir, reward_run):
    head = RewardModel.from_pretrained(tiny_ensemble_dir, with_backbone=False).head
    weights = torch.load(last(reward_run), weights_only=True)["state_dict"]
    for name, weight in head.state_dict().items():
        torch.testing.assert_close(weight, weights[f"head.{name}"], rtol=0, atol=0)


def test_an_exported_policy_needs_no_judge(stage_args, ppo_run, tiny_ensemble_dir, tiny_model_dir, tmp_path):
    # The judge's folder is on another machine: a policy is exported all the same.
    checkpoint = torch.load(last(ppo_run), weights_only=True)
    checkpoint["hyper_parameters"]["gold"] = {
        "class_path": "examples.sentiment.judge.SentimentJudge",
        "init_args": {"path": "gone"},
    }
    torch.save(checkpoint, tmp_path / "judged.ckpt")
    main(["export", f"--checkpoint={tmp_path / 'judged.ckpt'}", f"--output={tmp_path / 'out'}"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "out")
    assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("run", ["sft_run", "reward_run", "ppo_run"])
def test_export_keeps_its_hands_off_files(run, request, tmp_path):
    checkpoint = f"--checkpoint={last(request.getfixturevalue(run))}"
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="--output: expected a new or empty folder, got '.*' with files in it"):
        main(["export", checkpoint, f"--output={tmp_path}"])
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_export_wants_a_checkpoint(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"--checkpoint: expected a checkpoint, got 'nowhere.ckpt', which cannot be read \(it does not exist",
    ):
        main(["export", "--checkpoint=nowhere.ckpt", f"--output={tmp_path / 'out'}"])
    checkpoint(tmp_path / "other.ckpt", stage=None)
    with pytest.raises(ValueError, match=r"other.ckpt: expected a checkpoint of lit-vapo .*, got stage None"):
        main(["export", f"--checkpoint={tmp_path / 'other.ckpt'}", f"--output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


# The folder of a run.


@pytest.fixture
def held(sft_run, tmp_path):
    """A copy of a finished run, to do with as one likes."""
    return shutil.copytree(sft_run, tmp_path / "held")


def test_a_folder_with_a_run_is_refused(stage_args, held, untrained):
    before = {p: p.stat().st_mtime_ns for p in held.rglob("*")}
    message = (
        rf"trainer.default_root_dir: expected a folder without a run, got {held}, which holds finished.json. "
        r"Go on with --resume, replace it with --overwrite=true, or choose another folder."
    )
    with pytest.raises(ValueError, match=message):
        main(stage_args("sft", "fit", held))
    assert {p: p.stat().st_mtime_ns for p in held.rglob("*")} == before
    # A run that was interrupted is a run too.
    (held / "finished.json").unlink()
    with pytest.raises(ValueError, match=r"which holds .*\.ckpt"):
        main(stage_args("sft", "fit", held))


def test_overwriting_replaces_the_run_and_nothing_else(stage_args, held):
    (held / "checkpoints" / "notes.txt").write_text("mine")
    (held / "checkpoints" / "epoch=7-step=70.ckpt").write_text("of the old run")
    for name in ("samples_val.jsonl", "evaluations.csv"):
        (held / name).write_text("of the old run")
    main(stage_args("sft", "fit", held, "--overwrite=true"))
    assert (held / "checkpoints" / "notes.txt").read_text() == "mine"
    assert not (held / "checkpoints" / "epoch=7-step=70.ckpt").exists()
    assert not (held / "samples_val.jsonl").exists()
    assert not (held / "evaluations.csv").exists()
    assert torch.load(last(held), weights_only=True)["global_step"] == 2
    assert (held / "finished.json").is_file()


def test_a_mistaken_overwrite_costs_nothing(stage_args, held):
    with pytest.raises(ValueError, match=r"model.learning_rate: expected a number above 0, got -1"):
        main(stage_args("sft", "fit", held, "--overwrite=true", model__learning_rate=-1))
    assert last(held).is_file()
    assert (held / "finished.json").is_file()


def test_a_checkpoint_resumes_its_run(stage_args, tmp_path):
    folder, epoch = tmp_path / "run", {"trainer__limit_train_batches": 2}
    main(stage_args("sft", "fit", folder, **epoch))
    main(stage_args("sft", "fit", folder, ckpt_path=last(folder), trainer__max_steps=4, **epoch))
    assert torch.load(last(folder), weights_only=True)["global_step"] == 4


def test_a_checkpoint_from_elsewhere_does_not_open_a_held_folder(stage_args, sft_run, held, tmp_path, untrained):
    with pytest.raises(ValueError, match="expected a folder without a run"):
        main(stage_args("sft", "fit", held, ckpt_path=last(sft_run)))


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_a_missing_checkpoint_is_named_at_once(stage_args, tmp_path, command, untrained, monkeypatch):
    monkeypatch.setattr("lit_vapo.stages.reward.module.load_backbone", None)
    with pytest.raises(
        ValueError, match="--ckpt_path: expected a checkpoint, got 'nowhere.ckpt', which does not exist"
    ):
        main(stage_args("reward", command, tmp_path / "run", ckpt_path="nowhere.ckpt"))


def test_a_run_without_a_folder_is_refused(stage_args):
    with pytest.raises(ValueError, match="trainer.default_root_dir: expected a folder for the run, got null"):
        main(stage_args("sft", "fit", "null"))
