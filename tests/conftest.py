"""What all tests share: no network, one thread, a tiny model."""

import os
import sys

os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    JSONARGPARSE_DEPRECATION_WARNINGS="off",  # lightning 2.6 calls what jsonargparse 4.53 has renamed
)

import helpers
import pytest
import torch

from lit_vapo.cli import main

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Every test starts from the same random numbers, in whatever order and process it runs."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_run_left_open():
    """A process ends its run of W&B at its own end; tests share one, and the next would find the run still open."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


@pytest.fixture(autouse=True)
def no_report_of_ended_runs(request, monkeypatch):
    """The page at the end of a run takes a second or two; only tests marked `report` wait for it."""
    if "report" not in request.keywords:
        monkeypatch.setattr("lit_vapo.commands.run.write_page", lambda *_: None)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """Folder of a tiny Llama with its tokenizer."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    return helpers.tiny_model(path, helpers.tiny_tokenizer(path, chat_template=True))


@pytest.fixture(scope="session")
def tiny_preferences_file(tmp_path_factory):
    """A JSONL file of preferences."""
    return helpers.tiny_preferences(tmp_path_factory.mktemp("data") / "preferences.jsonl")


@pytest.fixture(scope="session")
def tiny_prompts_file(tmp_path_factory):
    """A JSONL file of prompts."""
    return helpers.tiny_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl")


@pytest.fixture(scope="session")
def stage_args(tiny_model_dir, tiny_preferences_file, tiny_prompts_file):
    """Command line of a stage with its tiny config; keywords replace options, `__` stands for a dot."""

    def args(stage, command, folder, *options, **replaced):
        given = {
            "config": helpers.CONFIGS / stage / "tiny.yaml",
            "trainer.default_root_dir": folder,
            "model.base.path": tiny_model_dir,
            "data.tokenizer": tiny_model_dir,
            "data.preferences": tiny_preferences_file,
            "data.prompts": tiny_prompts_file,
            **{key.replace("__", "."): value for key, value in replaced.items()},
        }
        return [stage, command, *(f"--{key}={value}" for key, value in given.items()), *options]

    return args


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory, stage_args):
    """Folder of a tiny run of supervised fine-tuning."""
    folder = tmp_path_factory.mktemp("runs") / "sft"
    main(stage_args("sft", "fit", folder))
    return folder


@pytest.fixture(scope="session")
def reward_run(tmp_path_factory, stage_args, tiny_model_dir):
    """Folder of a tiny run of reward training: three members, calibrated on the tiny model's own responses."""
    folder = tmp_path_factory.mktemp("runs") / "reward"
    reference = ("--model.reference_sampling.max_new_tokens=6", "--model.num_reference=12")
    main(stage_args("reward", "fit", folder, f"--model.reference.path={tiny_model_dir}", *reference))
    return folder


@pytest.fixture(scope="session")
def tiny_ensemble_dir(tmp_path_factory, reward_run):
    """Folder of the exported ensemble of `reward_run`."""
    folder = tmp_path_factory.mktemp("ensemble") / "exported"
    main(["export", f"--checkpoint={reward_run}/checkpoints/last.ckpt", f"--output={folder}"])
    return folder


@pytest.fixture(scope="session")
def ppo_run(tmp_path_factory, stage_args, tiny_ensemble_dir):
    """Folder of a tiny run of PPO against `tiny_ensemble_dir`."""
    folder = tmp_path_factory.mktemp("runs") / "ppo"
    main(stage_args("ppo", "fit", folder, model__reward=tiny_ensemble_dir))
    return folder


@pytest.fixture
def untrained(monkeypatch, sft_run, ppo_run):
    """Fail if a step of training is taken (after those of the shared runs, which a test may ask for later)."""

    def step(self, batch, batch_idx):
        raise AssertionError("training began")

    from lit_vapo.stages.ppo.module import PPOModule
    from lit_vapo.stages.reward.module import RewardModule
    from lit_vapo.stages.sft.module import SFTModule

    for module in (SFTModule, RewardModule, PPOModule):
        monkeypatch.setattr(module, "training_step", step)
