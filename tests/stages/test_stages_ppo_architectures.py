"""Architectures: two iterations of PPO on each, with adapters or whole, and a reference that may be quantised."""

import math

import helpers
import ppo_helpers
import pytest
import torch
from ppo_helpers import fit_ppo, ppo_module, prompt_data, state

from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.pretrained import Lora, Pretrained
from lit_vapo.stages.ppo.module import PPOModule
from lit_vapo.stages.ppo.update import UpdateSettings

SMALL_HEAD = {"head_dim": 16}
WINDOWS = {"sliding_window": 4, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]}
KINDS = {
    "gpt2": {},
    "llama": {},
    "qwen2": {},
    "qwen3": SMALL_HEAD,
    "mistral": {"sliding_window": 4},
    "gemma2": {**SMALL_HEAD, **WINDOWS, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**SMALL_HEAD, **WINDOWS},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model of each architecture and an ensemble on it."""
    found = {}

    def get(kind):
        if kind not in found:
            path = tmp_path_factory.mktemp("kinds") / kind
            model = helpers.tiny_model(path / "model", helpers.tiny_tokenizer(path / "model"), kind, **KINDS[kind])
            found[kind] = model, ppo_helpers.ensemble(path / "ensemble", model)
        return found[kind]

    return get


def check(module, folder, model, at_start=1e-8):
    module.configure_model()
    before = state(module)
    rows = fit_ppo(module, prompt_data(model, folder), folder, limit_train_batches=2)
    assert len(rows) == 2
    for row in rows:
        assert row["train/first_ratio"] == pytest.approx(1, abs=1e-4)
        assert row["train/first_ratio_max"] == pytest.approx(1, abs=1e-4)
        assert all(math.isfinite(value) for value in row.values())
    assert rows[0]["train/kl_k3"] <= at_start < rows[1]["train/kl_k3"]
    changed = [name for name, weight in state(module).items() if not torch.equal(weight, before[name])]
    assert len(changed) > 0.9 * len(before)
    assert any("value_head" in name for name in changed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_learns_with_adapters(made, tmp_path, kind):
    model, reward = made(kind)
    check(ppo_module(model, reward), tmp_path, model)


@pytest.mark.parametrize(("kind", "trunk"), [("gpt2", "own"), ("gemma3_text", "reference")])
def test_whole_models_learn_beside_their_reference(made, tmp_path, kind, trunk):
    model, reward = made(kind)
    check(ppo_module(model, reward, lora=None, critic=CriticSpec(trunk)), tmp_path, model)


@pytest.mark.parametrize("lora", [Lora(4, 16.0), None])
def test_the_reference_may_be_quantised(made, tmp_path, lora):
    model, _ = made("llama")
    base = Pretrained(model, quantization="8bit")
    reward = ppo_helpers.ensemble(tmp_path / "ensemble", model)
    module = PPOModule(
        base,
        reward,
        lora=lora,
        critic=CriticSpec("own" if lora is None else "lora"),
        sampling=ppo_helpers.Sampling(6),
        update=UpdateSettings(epochs=2, minibatches=2),
        learning_rate=1e-2,
        critic_learning_rate=1e-2,
    )
    # Without adapters the policy's weights are whole, so it starts at the distance of their rounding.
    check(module, tmp_path, model, at_start=1e-8 if lora is not None else 0.3)
    policy = module.networks.policy
    with policy.acting_as("reference") as reference:
        assert any(p.dtype == torch.int8 for p in reference.parameters())
    if lora is None:
        assert {p.dtype for p in module.networks.parameters() if p.requires_grad} == {torch.float32}
