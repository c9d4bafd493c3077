"""A model's folder is looked at before anything is loaded; what is wrong is named in our own words."""

import json
import shutil

import pytest
from helpers import last, tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lit_vapo.cli import main
from lit_vapo.models.digests import seal
from lit_vapo.models.policy import Policy
from lit_vapo.models.pretrained import (
    Lora,
    Pretrained,
    load_backbone,
    load_causal_lm,
    load_tokenizer,
    model_config,
)
from lit_vapo.models.weights import check_model, loading
from lit_vapo.rewards.reward_model import RewardModel

LOADERS = [load_causal_lm, load_backbone, model_config]


@pytest.fixture
def copied(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


@pytest.fixture(scope="module")
def adapter_dir(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


def pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def torn(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def odd_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')


def no_config(folder):
    (folder / "config.json").unlink()


def bad_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


def list_config(folder):
    (folder / "config.json").write_text("[1]")


def no_such_kind(folder):
    (folder / "config.json").write_text('{"model_type": "nothing"}')


FAULTS = [
    (pointer, "model.safetensors cannot be read; it is a Git LFS pointer of 63 bytes"),
    (torn, "model.safetensors cannot be read; it is torn or damaged"),
    (no_weights, r"expected weights in \*.safetensors in '.*/model', got \["),
    (no_shard, "model-00002-of-00002.safetensors cannot be read; it does not exist"),
    (odd_index, "expected a weight_map from weights to files in .*index.json, got int"),
    (no_config, r"expected a folder with a transformers model \(config.json\), .* \(it has no config.json\)"),
    (bad_config, "config.json cannot be read; it is a text file, and no JSON"),
    (list_config, "expected a JSON object in .*config.json, got list"),
    (no_such_kind, "the folder is there and cannot be read as one: ValueError"),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS)
@pytest.mark.parametrize("load", LOADERS)
def test_a_fault_of_a_folder_is_named(copied, spoil, message, load):
    spoil(copied)
    with pytest.raises(ValueError, match=f"^some.key: .*{message}") as error:
        load(Pretrained(str(copied)), key="some.key")
    assert "http" not in str(error.value)
    assert "internet" not in str(error.value)


@pytest.mark.parametrize("load", [*LOADERS, load_tokenizer])
@pytest.mark.parametrize("path", ["my/modell", "modell", "./gone", "/gone/model", "a/b/c", "~nobody/x"])
def test_what_is_not_there_is_named(load, path):
    message = rf"^some.key: expected a folder with a transformers model \(config.json\), or a hub name, got '{path}'"
    with pytest.raises(ValueError, match=message) as error:
        load(Pretrained(path), key="some.key")
    assert "http" not in str(error.value)


def test_a_hub_name_says_that_the_hub_was_not_asked():
    with pytest.raises(ValueError, match="no such folder in .*, none in the cache, and nothing was asked of the hub"):
        load_causal_lm(Pretrained("my/modell"))


def test_advice_of_the_library_does_not_reach_the_user():
    advice = "Please pass the argument `trust_remote_code=True` to allow custom code to be run."
    message = "runs only with model.base.trust_remote_code=true"
    with pytest.raises(ValueError, match=message) as error, loading("some/model", "model.base.path"):
        raise ValueError(f"some/model contains custom code.\n{advice}")
    assert "trust_remote_code=True" not in str(error.value)


# Adapters in place of models.


@pytest.mark.parametrize("load", LOADERS)
def test_an_adapter_is_no_model_however_its_path_is_written(adapter_dir, monkeypatch, load):
    monkeypatch.chdir(adapter_dir.parent)
    monkeypatch.setenv("HOME", str(adapter_dir.parent))
    for path in (adapter_dir, "adapter", "./adapter", "~/adapter", f"../{adapter_dir.parent.name}/adapter"):
        with pytest.raises(ValueError, match="some.key: expected a whole model, got an adapter: merge it"):
            load(Pretrained(str(path)), key="some.key")


def test_an_adapter_on_the_hub_is_no_model(adapter_dir, monkeypatch):
    found = str(adapter_dir / "adapter_config.json")
    monkeypatch.setattr("lit_vapo.models.weights.find_adapter_config_file", lambda name, revision: found)
    with pytest.raises(ValueError, match="some.key: expected a whole model, got an adapter"):
        check_model("some/adapter", "some.key")


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ("sft", "model.base"),
        ("reward", "model.base"),
        ("reward", "model.reference"),
        ("ppo", "model.base"),
        ("ppo", "model.critic.base"),
    ],
)
def test_every_option_that_names_a_model_is_looked_at(
    stage_args, tiny_ensemble_dir, adapter_dir, tmp_path, monkeypatch, stage, key, untrained
):
    monkeypatch.chdir(adapter_dir.parent)
    reward = {"model__reward": tiny_ensemble_dir} if stage == "ppo" else {}
    given = {**reward, f"{key.replace('.', '__')}__path": "adapter"}
    with pytest.raises(ValueError, match=f"^{key}.path: expected a whole model, got an adapter"):
        main(stage_args(stage, "fit", tmp_path / "run", **given))
    assert not (tmp_path / "run").exists()


# From elsewhere.


def test_what_was_trained_with_relative_paths_loads_from_elsewhere(
    stage_args, tiny_model_dir, tiny_ensemble_dir, tmp_path, monkeypatch
):
    here = tmp_path / "here"
    shutil.copytree(tiny_model_dir, here / "model")
    shutil.copytree(tiny_ensemble_dir, here / "ensemble")
    monkeypatch.chdir(here)
    relative = {"model__base__path": "model", "data__tokenizer": "model"}
    main(stage_args("reward", "fit", here / "reward", **relative))
    # The ensemble's members were made on the same base elsewhere: only where the folders are found matters here.
    main(stage_args("ppo", "fit", here / "ppo", model__reward="ensemble", **relative))
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(there)
    for stage in ("reward", "ppo"):
        main(["export", f"--checkpoint={last(here / stage)}", f"--output={stage}"])
    assert RewardModel.from_pretrained("reward").spec.base.path == str(here / "model")
    saved = json.loads((there / "ppo" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(here / "model")


def test_an_ensemble_whose_base_is_gone_says_who_asks(tiny_ensemble_dir, tmp_path):
    folder = shutil.copytree(tiny_ensemble_dir, tmp_path / "ensemble")
    described = json.loads((folder / "ensemble.json").read_text())
    described["spec"]["base"]["path"] = "/gone/model"
    (folder / "ensemble.json").write_text(json.dumps(described))
    seal(folder)
    with pytest.raises(ValueError, match=rf"the base of the ensemble in '{folder}': expected a folder .*'/gone/model'"):
        RewardModel.from_pretrained(folder)


# Adapters that would do nothing.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "model.lora.rank: expected at least 1, got 0"),
        ({"alpha": 0.0}, "model.lora.alpha: expected a number above 0, got 0.0"),
        ({"alpha": -1.0}, "model.lora.alpha: expected a number above 0, got -1.0"),
        ({"alpha": float("nan")}, "model.lora.alpha: expected a number above 0, got nan"),
        ({"target_modules": []}, "model.lora.target_modules: expected names of layers"),
    ],
)
def test_adapters_without_effect_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Lora(**given)


@pytest.mark.parametrize("top_layers", [None, 1])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_name_of_a_target_must_match(tmp_path, kind, top_layers):
    base = Pretrained(tiny_model(tmp_path / "model", tiny_tokenizer(tmp_path / "model"), kind=kind))
    right = "q_proj" if kind == "llama" else "c_attn"
    message = rf"model.lora.target_modules: expected each to be one of \[.*'{right}'.*\], got \['v_porj', 'wte'\]"
    with pytest.raises(ValueError, match=message):
        Policy(base, Lora(target_modules=["v_porj", right, "wte"], top_layers=top_layers))
    policy = Policy(base, Lora(target_modules=[right], top_layers=top_layers))
    assert sum(p.numel() for p in policy.actor_parameters()) > 0


def test_a_model_of_ours_must_be_as_it_was_written(copied):
    check_model(str(copied), "model.base.path")
    seal(copied)
    check_model(str(copied), "model.base.path")
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"model.safetensors: expected .* it was changed or damaged"):
        check_model(str(copied), "model.base.path")
