"""Members that adapt the policy's own base: they score as they would on a base of their own, and hold none."""

import re

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from ppo_helpers import fit_ppo, make_rollout, ppo_module, prompt_data, saved_ensemble, with_reward

from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.pretrained import (
    Lora,
    Pretrained,
    decoder_layers,
    freeze,
    load_backbone,
    load_causal_lm,
)
from lit_vapo.rewards.features import compute_features
from lit_vapo.rewards.reward_model import RewardModel
from lit_vapo.types import TokenSequence

CPU = torch.device("cpu")
SEQUENCES = [TokenSequence(list(range(5, 5 + n)), 2) for n in (4, 9, 3, 6)]


def networks(model, reward, lora=True, quantization=None, critic=None):
    base = Pretrained(model, quantization=quantization)
    nets = with_reward(base, Lora(4, 16.0) if lora else None, critic, reward)
    for i, p in enumerate(nets.actor_parameters()):  # an actor that differs from its reference
        p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.3)
    return nets


def elements(module):
    """Numbers held, adapters and heads of rewards and values aside."""
    return sum(p.numel() for n, p in module.named_parameters() if not re.search("lora_|^critic", n))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            path = tmp_path_factory.mktemp("bases") / kind
            sizes = {"head_dim": 16} if kind == "gemma2" else {}
            made[kind] = tiny_model(path, tiny_tokenizer(path), kind, **sizes)
        return made[kind]

    return get


@pytest.mark.parametrize(
    ("kind", "lora", "quantization", "options"),
    [
        ("llama", True, None, {}),
        ("llama", True, "8bit", {}),
        ("llama", True, None, {"top_layers": 1}),
        ("llama", False, None, {}),
        ("llama", False, "8bit", {}),
        ("gpt2", True, None, {}),
        ("gemma2", True, None, {}),
    ],
)
def test_scores_are_those_of_an_ensemble_by_itself(folders, tmp_path, kind, lora, quantization, options):
    reward = saved_ensemble(tmp_path / "ensemble", folders(kind), quantization, **options)
    alone = RewardModel.from_pretrained(reward)
    expected = alone.head.rewards(compute_features(alone, SEQUENCES, CPU))
    assert expected.std(1).min() > 0.01
    critic = CriticSpec("lora" if lora else "reference")
    nets = networks(folders(kind), reward, lora, quantization, critic)
    own = nets.scorer.model
    # Without LoRA the policy's own weights stand beside its reference.
    assert elements(nets) == (1 if lora else 2) * elements(load_causal_lm(Pretrained(folders(kind))))
    torch.testing.assert_close(own.head.rewards(compute_features(own, SEQUENCES, CPU)), expected, atol=1e-5, rtol=1e-5)
    assert own.backbone is None
    # Neither actor nor reference knows of the members.
    lm = Pretrained(folders(kind), quantization=quantization)
    plain = freeze(load_backbone(lm))
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        states = nets.policy.lend(lambda backbone: backbone(input_ids=ids).last_hidden_state)
        torch.testing.assert_close(states, plain(input_ids=ids).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad for p in nets.actor_parameters())


def test_members_of_another_or_a_truncated_base_keep_their_own(folders, tmp_path):
    short = saved_ensemble(tmp_path / "short", folders("llama"), layer=1)
    nets = networks(folders("llama"), short)
    assert nets.scorer.model.lender is None
    assert len(decoder_layers(nets.scorer.model.backbone)) == 1
    other = saved_ensemble(tmp_path / "other", folders("gpt2"))
    assert networks(folders("llama"), other).scorer.model.lender is None


def test_ppo_learns_with_members_on_its_own_base(folders, tmp_path):
    reward = saved_ensemble(tmp_path / "ensemble", folders("llama"))
    module = ppo_module(folders("llama"), reward)
    rows = fit_ppo(module, prompt_data(folders("llama"), tmp_path), tmp_path, limit_train_batches=2)
    assert rows[0]["train/first_ratio"] == pytest.approx(1, abs=1e-4)
    assert rows[0]["train/kl_k3"] == pytest.approx(0, abs=1e-8)
    assert rows[1]["train/kl_k3"] > 0
    alone = RewardModel.from_pretrained(reward)
    rollout = make_rollout(module, folders("llama"))
    rows = rollout.rows
    lengths = zip(rows.input_ids.tolist(), rows.prompt_lengths.tolist(), rows.lengths.tolist(), strict=True)
    read = [TokenSequence(ids[:length], start) for ids, start, length in lengths]
    expected = alone.head(compute_features(alone, read, CPU))
    torch.testing.assert_close(rollout.estimate.members, expected.members, atol=1e-5, rtol=1e-5)


def test_the_same_folder_by_another_name_is_the_same_base(folders, tmp_path):
    model = folders("llama")
    other = tmp_path / "linked"
    other.symlink_to(model)
    reward = saved_ensemble(tmp_path / "ensemble", model)
    nets = networks(str(other), reward)
    assert elements(nets) == elements(networks(model, reward))
