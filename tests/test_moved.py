"""Models on another machine or in a container: under another path, and read by another user."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import last, tiny_model, tiny_tokenizer
from ppo_helpers import ensemble, ppo_module
from public_helpers import classifier
from rewards.test_rewards_lora import reward_model, tokens

from lit_vapo.cli import main
from lit_vapo.folders import absolute
from lit_vapo.models.exported import same_model
from lit_vapo.models.policy import Policy
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.rewards import PretrainedRewards, load_reward
from lit_vapo.rewards.features import save_features
from lit_vapo.rewards.placement import SharedTrunk
from lit_vapo.rewards.reward_model import RewardModel

WARNED = "is no folder here; .* is taken for it .LIT_VAPO_MODELS."
ADVICE = "if it has moved, name the folder that it is in now in the environment variable LIT_VAPO_MODELS"


@pytest.fixture
def base(tmp_path):
    """A base in a folder of the host's."""
    path = tmp_path / "host" / "models" / "base"
    return Path(tiny_model(path, tiny_tokenizer(path, chat_template=True)))


@pytest.fixture
def move(tmp_path, monkeypatch):
    """Let a folder be where a container has it, and say so."""

    def call(path, to="models"):
        target = tmp_path / to / path.name
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        monkeypatch.setenv("LIT_VAPO_MODELS", os.pathsep.join([str(tmp_path / "elsewhere"), str(target.parent)]))
        return str(target)

    return call


def test_an_ensemble_finds_its_base(base, move, tmp_path, monkeypatch):
    folder = ensemble(tmp_path / "ensemble", str(base))
    expected = RewardModel.from_pretrained(folder)(*tokens())
    there = move(base)
    with pytest.warns(UserWarning, match=WARNED):
        found = RewardModel.from_pretrained(folder)
    assert found.spec.base.path == there
    torch.testing.assert_close(found(*tokens()).members, expected.members)
    monkeypatch.delenv("LIT_VAPO_MODELS")
    with pytest.raises(ValueError, match=f"the base of the ensemble in .*does not exist; {ADVICE}"):
        RewardModel.from_pretrained(folder)


def test_adapters_find_their_base(base, move, tmp_path, monkeypatch):
    model = reward_model(str(base))
    model.save_pretrained(tmp_path / "ensemble")
    expected = model(*tokens()).members
    there = move(base)
    with pytest.warns(UserWarning, match=WARNED):
        found = RewardModel.from_pretrained(tmp_path / "ensemble")
    torch.testing.assert_close(found(*tokens()).members, expected)
    # Where nothing says where they were trained, they are refused.
    monkeypatch.delenv("LIT_VAPO_MODELS")
    settings = (tmp_path / "ensemble" / "member_0" / "adapter_config.json").read_text()
    assert str(base) in settings
    from lit_vapo.rewards.adapters import load_adapter

    with pytest.raises(ValueError, match=f"expected an adapter of .*, got one of .*; {ADVICE}"):
        load_adapter(tmp_path / "ensemble" / "member_0", model.backbone, there)


def change(folder, name):
    """Another model than it was, by a little."""
    if name == "weights":
        path = next(folder.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    elif name == "configuration":
        (folder / "config.json").write_text((folder / "config.json").read_text().replace('"rms_norm_eps": ', '"x": '))
    elif name == "one file more":
        (folder / "more.safetensors").write_bytes(b"")
    elif name == "no weights":
        next(folder.glob("*.safetensors")).unlink()


@pytest.mark.parametrize("other", ["weights", "configuration", "one file more", "no weights"])
def test_what_differs_from_a_model_is_no_copy_of_it(base, tmp_path, other):
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    assert same_model(Pretrained(str(base)), Pretrained(str(copy)))
    assert not same_model(Pretrained(str(base)), Pretrained(str(copy), quantization="8bit"))
    change(copy, other)
    assert not same_model(Pretrained(str(base)), Pretrained(str(copy)))
    if other == "no weights":
        change(base, other)
        assert not same_model(Pretrained(str(base)), Pretrained(str(copy)))


def test_a_copy_of_the_base_shares_its_passes(base, tmp_path):
    folder = ensemble(tmp_path / "ensemble", str(base))
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    placed = []
    for name in (None, "weights"):
        change(copy, name)
        source = load_reward(folder)
        source.prepare(Policy(Pretrained(str(copy)), None))
        placed.append(isinstance(source._placement, SharedTrunk))
    assert placed == [True, False]


def test_adapters_fit_a_copy_of_their_base(base, tmp_path):
    from lit_vapo.rewards.adapters import load_adapter

    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    model = reward_model(str(base))
    model.save_pretrained(tmp_path / "ensemble")
    assert load_adapter(tmp_path / "ensemble" / "member_0", model.backbone, str(copy)).weights
    change(copy, "weights")
    with pytest.raises(ValueError, match="expected an adapter of .*, got one of"):
        load_adapter(tmp_path / "ensemble" / "member_0", model.backbone, str(copy))


def test_public_rewards_find_theirs(move, tmp_path):
    theirs = Path(classifier(tmp_path / "host" / "theirs"))
    source = PretrainedRewards([Pretrained(str(theirs)), Pretrained(str(theirs))])
    source.prepare(None)
    source.save_pretrained(tmp_path / "rewards")
    there = move(theirs)
    with pytest.warns(UserWarning, match=WARNED):
        found = load_reward(str(tmp_path / "rewards"))
    assert [model.path for model in found.models] == [there, there]


def test_a_policy_and_its_checkpoint_find_theirs(base, move, tmp_path, stage_args, monkeypatch):
    words = {"model__reward": ensemble(tmp_path / "ensemble", str(base)), "data__tokenizer": base}
    main(stage_args("ppo", "fit", tmp_path / "run", model__base__path=base, **words))
    there = move(base)
    with pytest.warns(UserWarning, match=WARNED):
        main(["export", f"--checkpoint={last(tmp_path / 'run')}", f"--output={tmp_path / 'policy'}"])
    assert f'"{there}"' in (tmp_path / "policy" / "adapter_config.json").read_text()
    # What was exported on the host names the folder there.
    other = tmp_path / "there_no_more" / "base"
    config = (tmp_path / "policy" / "adapter_config.json").read_text().replace(there, str(other))
    (tmp_path / "policy" / "adapter_config.json").write_text(config)
    (tmp_path / "policy" / "digests.json").unlink()
    monkeypatch.delenv("LIT_VAPO_MODELS")
    with pytest.raises(ValueError, match=f"model.policy: expected an adapter of model.base, .*; {ADVICE}"):
        ppo_module(there, str(tmp_path / "ensemble"), lora=None, policy=str(tmp_path / "policy"))
    monkeypatch.setenv("LIT_VAPO_MODELS", str(Path(there).parent))
    with pytest.warns(UserWarning, match=WARNED):
        module = ppo_module(there, str(tmp_path / "ensemble"), lora=None, policy=str(tmp_path / "policy"))
    assert module.lora.rank == 4


def test_more_of_a_path_counts_for_more(tmp_path, monkeypatch):
    for name in ("first/b", "second/a/b", "first/c"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("LIT_VAPO_MODELS", f"{tmp_path / 'first'}{os.pathsep}{tmp_path / 'second'}{os.pathsep}")
    with pytest.warns(UserWarning, match=WARNED):
        assert absolute("/gone/a/b") == str(tmp_path / "second" / "a" / "b")
    with pytest.warns(UserWarning, match=WARNED):
        assert absolute("/gone/z/b") == str(tmp_path / "first" / "b")
    # What is there stays, and what no absolute path is nobody looks for.
    assert absolute(str(tmp_path / "second")) == str(tmp_path / "second")
    assert absolute("b") == "b"
    assert absolute("/gone/d") == "/gone/d"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_others_may_read_what_a_run_leaves_as_far_as_the_umask_says(stage_args, base, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        main(stage_args("reward", "fit", tmp_path / "reward", f"--model.feature_cache={tmp_path / 'cache'}"))
        main(["export", f"--checkpoint={last(tmp_path / 'reward')}", f"--output={tmp_path / 'ensemble'}"])
        main(stage_args("ppo", "fit", tmp_path / "ppo", model__reward=tmp_path / "ensemble"))
        main(["export", f"--checkpoint={last(tmp_path / 'ppo')}", f"--output={tmp_path / 'policy'}"])
        main(["export", f"--checkpoint={last(tmp_path / 'ppo')}", f"--output={tmp_path / 'whole'}", "--merge=true"])
        save_features(tmp_path / "cache", "key", torch.zeros(2, 2))
    finally:
        os.umask(before)
    folders = ("cache", "reward", "ensemble", "ppo", "policy", "whole")
    files = [path for name in folders for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".ckpt", ".json", ".csv"}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: oct(mode) for path in files}
