"""Policies, critics and bases of others: what they say is checked before it is used, and none of their code runs."""

import json
import random
import shutil
from contextlib import suppress

import pytest
import torch
from hostile_helpers import EVIL, edit, ensemble, refused
from ppo_helpers import ppo_module
from safetensors.torch import load_file, save_file

from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.digests import seal
from lit_vapo.models.exported import check_policy
from lit_vapo.models.pretrained import Lora, Pretrained, load_causal_lm, load_tokenizer, model_config


@pytest.fixture(scope="module")
def sound(tiny_model_dir, tmp_path_factory):
    """A policy with its critic, and the ensemble it was trained on."""
    root = tmp_path_factory.mktemp("sound")
    module = ppo_module(tiny_model_dir, str(ensemble(root / "e", tiny_model_dir)), lora=Lora(4, 16.0))
    module.configure_model()
    module.export(root / "policy")
    return root


@pytest.fixture
def policy(sound, tmp_path):
    """A copy of it to be changed."""
    return shutil.copytree(sound / "policy", tmp_path / "policy")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"r": 10**9}, "adapter_config.json: r: expected less than or equal to 100000, got 1000000000"),
        ({"r": 0}, "adapter_config.json: r: expected greater than or equal to 1, got 0"),
        ({"r": "4"}, "adapter_config.json: r: expected a valid integer, got '4'"),
        ({"r": None}, "adapter_config.json: r: expected a valid integer"),
        ({"lora_alpha": float("nan")}, "adapter_config.json: lora_alpha: "),
        ({"lora_alpha": -1}, "adapter_config.json: lora_alpha: expected greater than 0, got -1"),
        ({"target_modules": {"a": 1}}, "adapter_config.json: target_modules"),
        ({"target_modules": [1]}, "adapter_config.json: target_modules"),
        ({"layers_to_transform": ["0"]}, "adapter_config.json: layers_to_transform"),
        ({"peft_type": ["LORA"]}, "adapter_config.json: peft_type: expected a valid string"),
        ({"base_model_name_or_path": 3}, "adapter_config.json: base_model_name_or_path: "),
        ({"base_model_name_or_path": "\x00"}, "expected an adapter of model.base"),
    ],
)
def test_an_adapter_says_what_it_is(policy, tiny_model_dir, values, reason):
    edit(policy / "adapter_config.json", **values)
    (policy / "digests.json").unlink()
    refused(reason, check_policy, str(policy), Pretrained(tiny_model_dir), None)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 50_000, '"a"'], ids=range(5))
def test_an_adapter_that_says_nothing_is_refused(policy, tiny_model_dir, text):
    (policy / "adapter_config.json").write_text(text)
    (policy / "digests.json").unlink()
    refused("adapter_config.json: ", check_policy, str(policy), Pretrained(tiny_model_dir), None)


def test_every_flipped_bit_of_a_policy_is_noticed(policy, tiny_model_dir):
    draw = random.Random(0)
    check_policy(str(policy), Pretrained(tiny_model_dir), None)
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "critic/critic.safetensors"):
        path, whole = policy / name, (policy / name).read_bytes()
        for _ in range(10):
            bit = draw.randrange(8 * len(whole))
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            refused(
                f"{name}: expected the .* bytes that were written",
                check_policy,
                str(policy),
                Pretrained(tiny_model_dir),
                None,
            )
        path.write_bytes(whole)


def started(policy, sound, model):
    module = ppo_module(model, str(sound / "e"), lora=None, policy=str(policy), critic=CriticSpec())
    module.configure_model()
    return module.networks


@pytest.mark.parametrize(
    ("file", "name"), [("adapter_model.safetensors", ""), ("critic/critic.safetensors", "value_head.weight")]
)
def test_weights_are_finite(policy, sound, tiny_model_dir, file, name):
    weights = load_file(policy / file)
    weights[name or next(iter(weights))].view(-1)[0] = float("nan")
    save_file(weights, policy / file)
    seal(policy)
    refused(f"{file}: expected .* to be finite", started, policy, sound, tiny_model_dir)


@pytest.mark.parametrize(
    ("values", "reason"),
    [({"trunk": "other"}, "trunk: "), ({"layer": 0}, "layer: "), ({"base": None}, "base: "), ({"odd": 1}, "odd: ")],
)
def test_a_critic_says_what_it_reads(policy, sound, tiny_model_dir, values, reason):
    edit(policy / "critic" / "critic.json", **values)
    (policy / "critic" / "digests.json").unlink()
    seal(policy)
    refused(f"critic.json: {reason}", started, policy, sound, tiny_model_dir)


@pytest.mark.parametrize("read", [model_config, load_tokenizer, load_causal_lm])
@pytest.mark.parametrize("kind", ["llama", "odd"])
def test_a_model_with_code_of_its_own_runs_none(tiny_model_dir, tmp_path, monkeypatch, read, kind):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (folder / "trap.py").write_text(EVIL.format(marker=str(tmp_path / "marker")))
    own = {"AutoConfig": "trap.Evil", "AutoModelForCausalLM": "trap.Evil", "AutoTokenizer": ["trap.Evil", "trap.Evil"]}
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(
            json.dumps({**config, "auto_map": own, **({"model_type": kind} if name[0] == "c" else {})})
        )

    def asked(*args):
        raise AssertionError("somebody was asked whether to run it, and waited for")

    monkeypatch.setattr("builtins.input", asked)
    # Where transformers knows the kind of model it reads it without its code, and else refuses it.
    with suppress(ValueError, OSError):
        read(Pretrained(str(folder)))
    assert not (tmp_path / "marker").exists()


def test_pickled_weights_are_not_read(tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (folder / "model.safetensors").unlink()

    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "marker"), "w")

    torch.save({"weight": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises((ValueError, OSError)):
        load_causal_lm(Pretrained(str(folder)))
    assert not (tmp_path / "marker").exists()
