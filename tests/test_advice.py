"""A run that has no more memory: one message, which says where it was and which keys to turn."""

import importlib

import pytest
import torch
from helpers import last

from lit_vapo.cli import main
from lit_vapo.commands.advice import KEYS, is_out_of_memory
from lit_vapo.console import reported


def device(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of …")


def cpu(*args, **kwargs):
    # The real words, with more bytes than any machine has.
    torch.empty(2**60)


def process(*args, **kwargs):
    raise MemoryError


RAISED = {
    device: "CUDA out of memory. Tried to allocate 2.00 GiB.",
    cpu: "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4611686018427387904 bytes",
    process: "MemoryError",
}


def message(words, capsys):
    with pytest.raises(SystemExit) as error, reported():
        main(words)
    assert error.value.code == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("raised", RAISED)
def test_every_kind_of_it_ends_in_one_message(stage_args, tmp_path, monkeypatch, capsys, raised):
    from lit_vapo.stages.sft import module

    monkeypatch.setattr(module.SFTModule, "_nll", raised)
    lines = message(stage_args("sft", "fit", tmp_path / "run", "--trainer.num_sanity_val_steps=0"), capsys)
    (start,) = [i for i, line in enumerate(lines) if line.startswith("lit-vapo: error:")]
    assert lines[start].startswith("lit-vapo: error: lit-vapo sft fit: out of memory in a training step (")
    assert RAISED[raised] in lines[start]
    assert "  data.batch_size (now 4): lower it" in lines[start + 2]
    assert [line.split()[0].rstrip(":") for line in lines[start + 2 :]] == [*KEYS["sft"]]


def of_training(monkeypatch):
    from lit_vapo.stages.ppo.update import PPOUpdate

    monkeypatch.setattr(PPOUpdate, "_loss", device)


def of_answering(monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "generate", device)


def of_scoring(monkeypatch):
    from lit_vapo.rewards.ensemble import PlacedEnsemble

    monkeypatch.setattr(PlacedEnsemble, "score", device)


def of_loading(monkeypatch):
    from lit_vapo.stages.ppo.module import PPOModule

    monkeypatch.setattr(PPOModule, "load_networks", device)


def of_the_optimiser(monkeypatch):
    monkeypatch.setattr(importlib.import_module("torch.optim.adam"), "adam", device)


ALL = list(KEYS["ppo"])
# What was done, and which keys are named.
PHASES = {
    of_training: ("an update", ALL),
    of_answering: ("the writing of responses", ALL[1:]),
    of_scoring: ("the scoring of responses", ALL[1:]),
    of_loading: ("the loading of models", ALL[3:]),
    of_the_optimiser: ("a step of the optimiser", ALL[3:]),
}


@pytest.mark.parametrize("place", PHASES)
def test_the_message_says_where_the_run_was(stage_args, tiny_ensemble_dir, tmp_path, monkeypatch, capsys, place):
    place(monkeypatch)
    lines = message(stage_args("ppo", "fit", tmp_path / "run", model__reward=tiny_ensemble_dir), capsys)
    phase, keys = PHASES[place]
    (start,) = [i for i, line in enumerate(lines) if f"lit-vapo ppo fit: out of memory in {phase} (CUDA out of" in line]
    assert [line.split()[0].rstrip(":") for line in lines[start + 2 :]] == keys


def test_a_test_of_rewards_is_told_alike(stage_args, reward_run, tmp_path, monkeypatch, capsys):
    from lit_vapo.stages.reward.module import RewardModule

    monkeypatch.setattr(RewardModule, "_collect", cpu)
    words = stage_args("reward", "test", tmp_path / "run", "--data.test_fraction=0.2", ckpt_path=last(reward_run))
    lines = message(words, capsys)
    assert any("lit-vapo reward test: out of memory in a test step" in line for line in lines)


@pytest.mark.parametrize("stage", KEYS)
def test_the_keys_are_options_of_the_stage(stage_args, tmp_path, tiny_ensemble_dir, capsys, stage):
    words = stage_args(stage, "fit", tmp_path / "run")
    words += {
        "reward": ["--model.head=LoraEnsemble"],
        "ppo": [f"--model.reward={tiny_ensemble_dir}"],
        "sft": [],
    }[stage]
    with pytest.raises(SystemExit):
        main([*words, "--print_config"])
    import yaml

    config = yaml.safe_load(capsys.readouterr().out)
    for key in (*KEYS[stage], "trainer.accumulate_grad_batches"):
        place = config
        for name in key.split("."):
            place = place.get("init_args", place)
            assert name in place, key
            place = place[name]


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), ValueError("out of memory"), KeyError("x")])
def test_other_errors_stay_what_they_are(error):
    assert not is_out_of_memory(error)


def test_a_bug_keeps_its_traceback(stage_args, tmp_path, monkeypatch):
    from lit_vapo.stages.sft import module

    def step(*args):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(module.SFTModule, "_nll", step)
    with pytest.raises(RuntimeError, match="shapes do not fit"), reported():
        main(stage_args("sft", "fit", tmp_path / "run"))
