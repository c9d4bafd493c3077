"""The command line: what it says, finds, exports, guards, and refuses before training begins."""

import importlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from helpers import CONFIGS, tiny_model, tiny_tokenizer, write_jsonl
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_vapo.cli import STAGES, main
from lit_vapo.models.reward import RewardModel
from lit_vapo.modules.ppo import PPOModule
from lit_vapo.modules.reward import RewardModule
from lit_vapo.modules.sft import SFTModule

TURN = [{"role": "user", "content": "hi"}]


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture
def untrained(monkeypatch):
    """Fail if a step of training is taken."""

    def step(self, batch, batch_idx):
        raise AssertionError("training began")

    for module in (SFTModule, RewardModule, PPOModule):
        monkeypatch.setattr(module, "training_step", step)


# Words.


def test_usage(capsys):
    for words in ([], ["--help"], ["-h"]):
        main(words)
        text = capsys.readouterr().out
        assert text.startswith("usage: lit-vapo STAGE COMMAND [options]")
        assert all(f"\n  {word} " in text for word in (*STAGES, "export"))


def test_an_unknown_stage_is_refused_with_the_usage(capsys):
    with pytest.raises(SystemExit, match=r"lit-vapo: expected a stage \(sft, reward, ppo\) or export, got 'dpo'"):
        main(["dpo", "fit"])
    assert "usage: lit-vapo" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["reward"], ["reward", "train"]])
def test_a_stage_wants_a_command(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    error = capsys.readouterr().err
    assert "usage: lit-vapo reward" in error
    assert "{fit,validate,test,predict}" in error


def test_usage_answers_without_loading_torch():
    code = "import sys; from lit_vapo.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "usage: lit-vapo" in done.stdout


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
    assert "checkpoint" in error.splitlines()[-1]


# Classes of one's own.


OWN_HEAD = '''
import torch
from lit_vapo.functional import bradley_terry_loss
from lit_vapo.uncertainty.base import RewardHead


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

    def loss(self, chosen, rejected, margin, example_ids):
        return bradley_terry_loss(self.rewards(chosen), self.rewards(rejected), margin=margin).sum()
'''


def test_an_estimator_beside_you_trains_exports_and_loads(stage_args, tmp_path, monkeypatch):
    (tmp_path / "my_own_head.py").write_text(OWN_HEAD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    own = ("--model.head=my_own_head.Paired", "--model.head.spread=0.5")
    main(stage_args("reward", "fit", tmp_path / "run", *own))
    main(["export", f"--checkpoint={last(tmp_path / 'run')}", f"--output={tmp_path / 'out'}"])
    head = RewardModel.from_pretrained(tmp_path / "out").head
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
    with pytest.raises(ValueError, match="--checkpoint: expected a checkpoint file, got 'nowhere.ckpt'"):
        main(["export", "--checkpoint=nowhere.ckpt", f"--output={tmp_path / 'out'}"])
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
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
        rf"Resume with --ckpt_path={last(held)}, replace it with --overwrite=true, or choose another folder."
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
    (held / "samples_val.jsonl").write_text("of the old run")
    main(stage_args("sft", "fit", held, "--overwrite=true"))
    assert (held / "checkpoints" / "notes.txt").read_text() == "mine"
    assert not (held / "checkpoints" / "epoch=7-step=70.ckpt").exists()
    assert not (held / "samples_val.jsonl").exists()
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
    monkeypatch.setattr("lit_vapo.modules.reward.load_backbone", None)
    with pytest.raises(
        ValueError, match="--ckpt_path: expected a checkpoint, got 'nowhere.ckpt', which does not exist"
    ):
        main(stage_args("reward", command, tmp_path / "run", ckpt_path="nowhere.ckpt"))


def test_a_run_without_a_folder_is_refused(stage_args):
    with pytest.raises(ValueError, match="trainer.default_root_dir: expected a folder for the run, got null"):
        main(stage_args("sft", "fit", "null"))


# Checkpoints that do not fit.


@pytest.mark.parametrize(("run", "stage"), [("sft_run", "reward"), ("reward_run", "ppo"), ("ppo_run", "sft")])
def test_a_checkpoint_of_another_stage_is_refused(stage_args, tmp_path, request, run, stage, untrained):
    other = request.getfixturevalue(run)
    ensemble = {"model__reward": request.getfixturevalue("tiny_ensemble_dir")} if stage == "ppo" else {}
    message = f"checkpoint: expected one of stage '{stage}', got one of stage '{run.removesuffix('_run')}'"
    with pytest.raises(ValueError, match=message):
        main(stage_args(stage, "fit", tmp_path / "run", ckpt_path=last(other), **ensemble))


@pytest.fixture(scope="module")
def wide_model_dir(tmp_path_factory):
    """A model twice as wide."""
    path = tmp_path_factory.mktemp("wide") / "model"
    return tiny_model(path, tiny_tokenizer(path), hidden_size=64)


@pytest.mark.filterwarnings("ignore:checkpoint. model.* was .* and is now:UserWarning")
def test_a_checkpoint_of_another_architecture_is_refused(stage_args, reward_run, sft_run, wide_model_dir, tmp_path):
    message = r"checkpoint of another architecture: expected .* of shape \(.*\), got \(.*\)"
    with pytest.raises(ValueError, match=message):
        main(stage_args("reward", "test", tmp_path / "a", ckpt_path=last(reward_run), model__base__path=wide_model_dir))
    with pytest.raises(ValueError, match=message):
        main(stage_args("sft", "test", tmp_path / "b", ckpt_path=last(sft_run), model__base__path=wide_model_dir))
    members = "--model.head.init_args.num_members=5"
    with pytest.raises(ValueError, match=r"expected head.weight of shape \(5, 32\), got \(3, 32\)|of shape \(5"):
        main(stage_args("reward", "test", tmp_path / "c", members, ckpt_path=last(reward_run)))
    lora = "--model.lora.rank=4"
    with pytest.raises(ValueError, match="checkpoint of another architecture: unknown weights|no weights for"):
        main(stage_args("sft", "test", tmp_path / "d", lora, ckpt_path=last(sft_run)))


# What is refused before training.


@pytest.mark.parametrize(
    ("options", "key"),
    [(["--model.learningrate=1"], "model.learningrate"), (["--data.batchsize=1"], "data.batchsize")],
)
def test_an_unknown_option_is_named(stage_args, tmp_path, capsys, untrained, options, key):
    with pytest.raises(SystemExit):
        main(stage_args("reward", "fit", tmp_path / "run", *options))
    assert key in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "key"), [("model", "learningrate"), ("data", "batchsize"), ("trainer", "epochs"), (None, "modle")]
)
def test_an_unknown_key_of_a_file_is_named(stage_args, tmp_path, capsys, untrained, section, key):
    config = yaml.safe_load((CONFIGS / "reward" / "tiny.yaml").read_text())
    (config if section is None else config[section])[key] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        main(stage_args("reward", "fit", tmp_path / "run", config=tmp_path / "config.yaml"))
    assert key in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_value_of_another_type_is_named(stage_args, tmp_path, capsys, untrained):
    with pytest.raises(SystemExit):
        main(stage_args("sft", "fit", tmp_path / "run", data__batch_size="many"))
    assert "data.batch_size" in capsys.readouterr().err


ROWS = [
    ('{"prompt": "p", "chosen": "a"}', "line 2: expected column 'rejected', got columns ['chosen', 'prompt']"),
    ('{"prompt": "p", "chosen": "", "rejected": "b"}', "line 2: expected a response in column 'chosen', got an empty"),
    ('{"prompt": "p", "chosen": "b", "rejected": "b"}', "line 2: expected two different responses"),
    ('{"prompt": "p", ', "line 2: expected a JSON object, got malformed JSON"),
]


@pytest.mark.parametrize(("stage", "line", "message"), [("sft", *ROWS[0]), *(("reward", *row) for row in ROWS)])
def test_bad_rows_are_named_before_a_model_is_loaded(stage_args, tmp_path, monkeypatch, stage, line, message):
    def loading(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lit_vapo.models.pretrained.AutoModel.from_pretrained", loading)
    monkeypatch.setattr("lit_vapo.models.pretrained.AutoModelForCausalLM.from_pretrained", loading)
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"prompt": "p", "chosen": "a", "rejected": "b"}}\n{line}\n')
    with pytest.raises(ValueError) as error:  # noqa: PT011 – the message is compared as it stands
        main(stage_args(stage, "fit", tmp_path / "run", data__preferences=path))
    assert f"{path}, {message}" in str(error.value)


CONVERSATIONS = {
    "sft": {"prompt": TURN, "chosen": [{"role": "assistant", "content": "a"}], "rejected": TURN},
    "reward": {"chosen": [*TURN, {"role": "assistant", "content": "a"}], "rejected": [*TURN, *TURN]},
    "ppo": {"prompt": TURN},
}


@pytest.mark.parametrize("stage", STAGES)
def test_conversations_want_a_chat_template(stage_args, tmp_path, request, stage, untrained):
    tiny_tokenizer(tmp_path / "plain")
    path = write_jsonl(tmp_path / "chat.jsonl", [CONVERSATIONS[stage]])
    ensemble = {"model__reward": request.getfixturevalue("tiny_ensemble_dir")} if stage == "ppo" else {}
    options = {"data__tokenizer": tmp_path / "plain", "data__preferences": path, "data__prompts": path, **ensemble}
    message = (
        rf"chat.jsonl, line 1: expected a tokenizer with a chat template for conversational data, got "
        rf"'{tmp_path / 'plain'}', which has none"
    )
    with pytest.raises(ValueError, match=message):
        main(stage_args(stage, "fit", tmp_path / "run", **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model__kl_coef": -0.1}, r"model.kl_coef: expected a number of 0 or more, got -0.1"),
        ({"model__kl_target": 0}, r"model.kl_target: expected a number above 0, got 0"),
        ({"data__max_prompt_length": 3}, r"prompts.jsonl, line 1: expected a prompt of 1 … 3 tokens .*, got \d+"),
        (
            {"model__sampling__max_new_tokens": 100},
            r"data.max_prompt_length \+ model.sampling.max_new_tokens: expected at most the model's context of 128 "
            "tokens, got 132",
        ),
        ({"model__reward": "nowhere"}, r"reward: expected a folder with ensemble.json .*, got nowhere"),
        ({"data__batch_size": 1000}, r"data.batch_size: expected at most the \d+ prompts there are, got 1000"),
        (
            {"model__objective": "lit_vapo.objectives.single_reward.SingleReward", "model__objective__member": 3},
            r"member: expected an index below the 3 members, got 3",
        ),
        ({"model__base__path": "./gone"}, r"base.path: expected a folder with a transformers model"),
        ({"data__tokenizer": "./gone"}, r"data.tokenizer: expected a folder or hub name of a tokenizer, got './gone'"),
        ({"data__prompts": "gone.jsonl"}, r"data.prompts: expected a file, got 'gone.jsonl', which does not exist"),
    ],
)
def test_bad_settings_of_ppo_are_named(stage_args, tiny_ensemble_dir, tmp_path, options, message, untrained):
    with pytest.raises(ValueError, match=message):
        main(stage_args("ppo", "fit", tmp_path / "run", **{"model__reward": tiny_ensemble_dir, **options}))
    assert not (tmp_path / "run" / "finished.json").exists()
    assert not last(tmp_path / "run").exists()


def test_a_variance_wants_two_members(stage_args, tmp_path, untrained, tiny_ensemble_dir):
    one = tmp_path / "one"
    shutil.copytree(tiny_ensemble_dir, one)
    described = json.loads((one / "ensemble.json").read_text())
    (one / "ensemble.json").write_text(json.dumps({**described, "num_members": 1}))
    message = r"objective VarianceAware needs the variance of an ensemble: expected at least 2 members, got 1"
    with pytest.raises(ValueError, match=message):
        main(stage_args("ppo", "fit", tmp_path / "run", model__reward=one))


# What is handled.


def test_nothing_set_aside_for_validation(stage_args, tmp_path):
    main(stage_args("sft", "fit", tmp_path / "run", data__validation_fraction=0))
    assert (tmp_path / "run" / "finished.json").is_file()


def test_a_tokenizer_without_padding_trains(stage_args, tmp_path):
    model = tiny_model(tmp_path / "model", tiny_tokenizer(tmp_path / "model", pad=False))
    main(stage_args("reward", "fit", tmp_path / "run", data__tokenizer=model, model__base__path=model))
    assert torch.load(last(tmp_path / "run"), weights_only=True)["global_step"] == 2
