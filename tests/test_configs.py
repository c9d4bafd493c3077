"""Every file under configs/: it parses, instantiates, combines as its header says, and the tiny ones train."""

import contextlib
import csv
import io
import re
from pathlib import Path

import pytest
import torch
import yaml
from helpers import CONFIGS, tiny_model, tiny_tokenizer
from lightning.pytorch.loggers import WandbLogger
from transformers import AutoModelForCausalLM

from benchmarks.plan_models import MODELS, header, plans
from lit_vapo.callbacks.metrics_file import MetricsFile
from lit_vapo.cli import STAGES, main
from lit_vapo.commands.run import StageCLI
from lit_vapo.data.datamodule import PreferenceDataModule, PromptDataModule, SFTDataModule
from lit_vapo.objectives.base import Objective
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.stages.ppo.module import PPOModule
from lit_vapo.stages.reward.module import RewardModule
from lit_vapo.stages.sft.module import SFTModule

CLASSES = {
    "sft": (SFTModule, SFTDataModule),
    "reward": (RewardModule, PreferenceDataModule),
    "ppo": (PPOModule, PromptDataModule),
}
KINDS = {
    *STAGES,
    *["trainer", "logger", "data", "objective", "estimator", "advantage", "generator", "study", "model", "source"],
}
FILES = sorted(CONFIGS.rglob("*.yaml"))


def named(kind):
    return [pytest.param(f, id=f"{kind}/{f.stem}") for f in FILES if f.parent.name == kind]


class Built(StageCLI):
    """A stage with everything instantiated, and nothing run."""

    def _run_subcommand(self, subcommand):
        pass


@pytest.fixture
def build(tiny_model_dir, tiny_ensemble_dir, tmp_path):
    """Build a stage from config files, with the tiny model in place of what they name."""

    def call(stage, *options, reward=tiny_ensemble_dir):
        replaced = {
            "trainer.accelerator": "cpu",
            "trainer.default_root_dir": tmp_path / "run",
            "model.base.path": tiny_model_dir,
            "data.tokenizer": tiny_model_dir,
        }
        if stage == "reward":
            replaced["model.reference.path"] = tiny_model_dir
        if stage == "ppo":
            replaced |= {"model.reward": reward} if reward is not None else {}
            replaced["model.gold"] = "null"  # the demo's judge is a file that the demo makes
        args = ["fit", *map(str, options), *(f"--{key}={value}" for key, value in replaced.items())]
        return Built(*CLASSES[stage], stage=stage, args=args)

    return call


def test_every_file_is_of_a_kind_that_is_tested():
    assert {f.parent.name for f in FILES} == KINDS
    assert all(f.parent.parent == CONFIGS for f in FILES)


@pytest.mark.parametrize("file", [pytest.param(f, id=f"{f.parent.name}/{f.stem}") for f in FILES])
def test_header_says_command_hardware_and_prerequisites(file):
    header = "".join(line for line in file.read_text().splitlines(True) if line.startswith("#"))
    if file.parent.name != "data":
        assert "Command:" in header
        assert "Hardware:" in header
    # Files named there exist.
    for name in re.findall(r"configs/\w+/\w+\.yaml", header):
        assert (CONFIGS.parent / name).is_file(), name


@pytest.mark.parametrize("stage", STAGES)
def test_stage_configs_instantiate(stage, build):
    for file in FILES:
        if file.parent.name != stage:
            continue
        cli = build(stage, f"--config={file}")
        assert type(cli.model) is CLASSES[stage][0]
        assert type(cli.datamodule) is CLASSES[stage][1]


def test_runs_of_different_configs_have_different_folders():
    folders = [yaml.safe_load(f.read_text()).get("trainer", {}).get("default_root_dir") for f in FILES]
    known = [f for f in folders if f is not None]
    assert len(set(known)) == len(known)


@pytest.mark.parametrize("file", named("data"))
@pytest.mark.parametrize("stage", STAGES)
def test_data_configs_serve_every_stage(stage, file, build):
    cli = build(stage, f"--config={CONFIGS / stage / 'tiny.yaml'}", f"--data={file}")
    expected = yaml.safe_load(file.read_text())
    assert cli.datamodule.preference_sources["train"] == expected["preferences"]
    assert cli.datamodule.validation_fraction == expected["validation_fraction"]


@pytest.mark.parametrize("file", named("trainer"))
@pytest.mark.parametrize("stage", ["ppo"])
def test_trainer_configs_combine_with_a_stage(stage, file, build):
    expected = yaml.safe_load(file.read_text())
    # Without a GPU the same strategy stands on processes of the CPU, as the header of ddp.yaml says.
    devices = 2 if expected["devices"] == -1 else expected["devices"]
    cli = build(stage, f"--config={CONFIGS / stage / 'demo.yaml'}", f"--trainer={file}", f"--trainer.devices={devices}")
    assert cli.trainer.world_size == devices
    assert cli.trainer.precision == expected.get("precision", "32-true")
    # The stage's own settings stand.
    own = yaml.safe_load((CONFIGS / stage / "demo.yaml").read_text())["trainer"]
    assert cli.trainer.max_epochs == own["max_epochs"]


@pytest.mark.parametrize("file", named("logger"))
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_logger_configs_combine_with_a_stage(stage, file, build, tmp_path):
    offline = ["--trainer.logger.init_args.offline=true"] if file.stem == "wandb" else []
    where = f"--trainer.logger.init_args.save_dir={tmp_path}"
    cli = build(stage, f"--config={CONFIGS / stage / 'tiny.yaml'}", f"--config={file}", where, *offline)
    kinds = [type(getattr(logger, "tracker", logger)) for logger in cli.trainer.loggers]
    assert kinds == ([MetricsFile, WandbLogger] if file.stem == "wandb" else [MetricsFile])


@pytest.mark.parametrize("file", named("estimator"))
def test_estimator_configs_come_after_a_config_of_reward(file, build):
    cli = build("reward", f"--config={CONFIGS / 'reward' / 'pairs.yaml'}", f"--config={file}")
    assert type(cli.model.head).__name__.lower() == file.stem.replace("_", "")
    assert cli.model.spec.pooling == "mean"  # of the config before
    assert cli.trainer.max_epochs == yaml.safe_load(file.read_text()).get("trainer", {}).get("max_epochs", 20)


@pytest.mark.parametrize("file", named("objective"))
def test_objective_configs_come_after_a_config_of_ppo(file, build):
    cli = build("ppo", f"--config={CONFIGS / 'ppo' / 'demo.yaml'}", f"--config={file}")
    assert type(cli.model.objective).__name__.lower() == file.stem.replace("_", "")
    assert cli.model.sampling.max_new_tokens == 16  # the demo's


@pytest.mark.parametrize("file", named("advantage"))
def test_advantage_configs_come_after_a_config_of_ppo(file, build):
    cli = build("ppo", f"--config={CONFIGS / 'ppo' / 'demo.yaml'}", f"--config={file}")
    assert type(cli.model.advantage).__name__.lower() == file.stem.replace("_", "")
    assert cli.model.sampling.max_new_tokens == 16  # the demo's
    assert cli.model.critic is None


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Makes a tiny model of the architecture of a file of configs/model/."""

    def make(name):
        path = tmp_path_factory.mktemp(name) / "model"
        tokenizer = tiny_tokenizer(path, chat_template=True)
        return tiny_model(path, tokenizer, MODELS[name][0][0], head_dim=16, sliding_window=8)

    return make


@pytest.mark.parametrize("file", named("model"))
def test_model_configs_build_a_policy_of_their_architecture(file, build, stand_ins):
    path = stand_ins(file.stem)
    configs = [f"--config={CONFIGS / 'ppo' / 'large.yaml'}", f"--config={file}"]
    cli = build("ppo", *configs, f"--data={CONFIGS / 'data' / 'ultrafeedback.yaml'}")
    given = yaml.safe_load(file.read_text())["model"]["base"]
    assert cli.model.base.quantization == given.get("quantization")
    assert cli.model.base.dtype == "bfloat16"
    assert cli.model.base.gradient_checkpointing  # of the config before it
    cli.model.base.path = path
    networks = cli.model.load_networks()
    assert networks.policy.causal_lm.config.model_type == MODELS[file.stem][0][0]
    assert networks.actor_parameters()


@pytest.mark.parametrize("file", named("model"))
@pytest.mark.parametrize("stage", ["reward", "sft"])
def test_model_configs_serve_every_stage(file, stage, build):
    before = CONFIGS / stage / ("large.yaml" if stage == "reward" else "tiny.yaml")
    cli = build(stage, f"--config={before}", f"--config={file}")
    spec = cli.model.spec.base if stage == "reward" else cli.model.base
    assert spec.quantization == yaml.safe_load(file.read_text())["model"]["base"].get("quantization")


def test_every_model_config_has_known_dimensions():
    assert {f.stem for f in FILES if f.parent.name == "model"} == MODELS.keys()


def test_headers_of_models_are_what_the_plan_says(tmp_path):
    # One for all: `python benchmarks/plan_models.py` writes them.
    name = "llama3_1b"
    assert header(name, plans(name, tmp_path)) in (CONFIGS / "model" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("file", named("source"))
def test_source_configs_come_after_a_config_of_ppo(file, build):
    given = yaml.safe_load(file.read_text())["model"]["reward"]["init_args"]["models"]
    cli = build("ppo", f"--config={CONFIGS / 'ppo' / 'large.yaml'}", f"--config={file}", reward=None)
    assert [spec.path for spec in cli.model.reward.models] == [model["path"] for model in given]
    assert cli.model.reward.num_members == len(given) > 1


@pytest.mark.parametrize("file", named("generator"))
def test_generator_configs_come_after_a_config_of_ppo(file, build):
    cli = build("ppo", f"--config={CONFIGS / 'ppo' / 'demo.yaml'}", f"--config={file}")
    assert type(cli.model.generator).__name__.lower() == file.stem + "generator"
    assert cli.model.generator.python == "vllm/bin/python"
    assert cli.model.sampling.max_new_tokens == 16  # the demo's


# The tiny configs train for two steps.


def checkpoint(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def metrics(folder):
    with next(folder.glob("logs/version_*/metrics.csv")).open() as file:
        return list(csv.DictReader(file))


def test_tiny_sft_changes_weights(sft_run, tiny_model_dir):
    saved = checkpoint(sft_run)
    assert saved["global_step"] == 2
    before = AutoModelForCausalLM.from_pretrained(tiny_model_dir).state_dict()
    # Keys end alike, whatever the module calls the model.
    ends = {next(k for k in before if name.endswith(k)): w for name, w in saved["state_dict"].items()}
    assert len(ends) > 10
    assert all(not torch.equal(before[k], w) for k, w in ends.items())


def test_tiny_reward_changes_weights(reward_run):
    saved = checkpoint(reward_run)
    assert saved["global_step"] == 2
    initial = HeadEnsemble(3)
    initial.build(32)
    moved = (saved["state_dict"]["head.weight"] - initial.weight).abs()
    assert (moved.amax(dim=1) > 0).all()  # every member
    assert moved.max() < 0.01  # two steps of at most the learning rate 0.001 each
    assert len([r for r in metrics(reward_run) if r.get("train/loss")]) == 2


def test_tiny_ppo_changes_weights(ppo_run):
    saved = checkpoint(ppo_run)
    assert saved["global_step"] == 4  # two iterations of two minibatches
    moved = [w for n, w in saved["state_dict"].items() if "lora_B" in n]  # adapters start at zero
    assert moved
    assert all(w.abs().sum() > 0 for w in moved)
    assert [float(r["train/iteration"]) for r in metrics(ppo_run) if r.get("train/iteration")] == [1.0, 2.0]


@pytest.mark.parametrize("run", ["sft_run", "reward_run", "ppo_run"])
def test_a_run_keeps_its_whole_configuration(run, request):
    folder = request.getfixturevalue(run)
    config = yaml.safe_load(next(folder.glob("logs/version_*/config.yaml")).read_text())
    assert config["data"]["batch_size"] == 4
    assert config["trainer"]["default_root_dir"] == str(folder)
    assert (folder / "finished.json").is_file()


# Help.

SIGNATURE = re.compile(r"^ {2}(--(?:model|data)(?:\.\w+)*)(?=[ ,]|$)")


def help_of(*args):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        main([*args])
    assert stop.value.code == 0
    return out.getvalue()


def options(text):
    """Description of each option of the model and the data, without jsonargparse's note of type and default."""
    found, name = {}, None
    for line in text.splitlines():
        match = SIGNATURE.match(line)
        if match:
            name = match[1]
            # On the line of a short option the description follows after two spaces.
            found[name] = line[match.end() :].partition("  ")[2].strip()
        elif name and line.startswith(" " * 10):
            found[name] += " " + line.strip()
        else:
            name = None
    return {k: re.sub(r"\(?(?:required, )?\(?type: .*", "", v).strip() for k, v in found.items()}


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize("stage", STAGES)
def test_help_documents_every_option(stage):
    text = help_of(stage, "fit", "--help_all")
    found = options(text)
    assert {"--data.batch_size", "--model.learning_rate", "--model.base.path"} <= found.keys()
    assert len(found) > 25
    assert [name for name, words in found.items() if not words] == []
    # Options in groups of their own.
    for name in sorted(set(re.findall(r"--(model(?:\.\w+)+)\.help(?=\s|$)(?! \[CLASS)", text))):
        nested = options(help_of(stage, "fit", f"--{name}.help"))
        assert nested, name
        assert [option for option, words in nested.items() if not words] == []


def subclasses(kind):
    return [k for k in kind.__subclasses__() if k.__module__.startswith("lit_vapo.")]


@pytest.mark.parametrize(
    ("stage", "option", "kind"),
    [
        pytest.param(stage, option, kind, id=kind.__name__)
        for stage, option, base in [("ppo", "model.objective", Objective), ("reward", "model.head", RewardHead)]
        for kind in subclasses(base)
    ],
)
def test_help_documents_every_plug_in(stage, option, kind):
    text = help_of(stage, "fit", f"--{option}.help={kind.__module__}.{kind.__name__}")
    found = options(text)
    parameters = kind.__init__.__code__.co_varnames[1 : kind.__init__.__code__.co_argcount]
    if kind.__init__ is not Objective.__init__:
        # A plug-in that has plug-ins itself offers help on these.
        assert {name.rpartition(".")[2] for name in found} - {"help"} == set(parameters)
    assert [name for name, words in found.items() if not words] == []


def test_configs_are_found_from_anywhere(build, monkeypatch, tmp_path):
    # demo.yaml names ../data/sentiment.yaml, relative to itself.
    monkeypatch.chdir(tmp_path)
    cli = build("reward", f"--config={CONFIGS / 'reward' / 'demo.yaml'}")
    assert cli.datamodule.validation_fraction == 0.2
    assert Path.cwd() == tmp_path
