"""Blocks below the adapters: computed once in an iteration, and what comes of it is as if they were computed anew."""

from contextlib import suppress

import helpers
import ppo_helpers
import pytest
import torch

from lit_vapo.models.actor_critic import ActorCritic
from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.generation import Shaping
from lit_vapo.models.lower_blocks import LowerBlocks
from lit_vapo.models.pretrained import Lora, Pretrained, decoder_layers
from lit_vapo.models.token_rows import TokenRows

KINDS = ["llama", "gpt2", "gemma2", "falcon"]
SIZES = {"gemma2": {"head_dim": 16}}
TOP = Lora(4, 16.0, top_layers=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models of three blocks by architecture."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = helpers.tiny_tokenizer(root / "llama")
    return {k: helpers.tiny_model(root / k, tokenizer, k, layers=3, **SIZES.get(k, {})) for k in KINDS}


def moved(folder, lora=TOP, critic=None, **kwargs):
    """Networks whose policy differs from the reference."""
    torch.manual_seed(0)
    nets = ActorCritic(Pretrained(folder, **kwargs), lora, critic)
    for name, parameter in nets.policy.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    return nets


def rows(folder):
    """Rows of different lengths, some tokens of which are padding."""
    ids = torch.randint(3, 60, (4, 14), generator=torch.Generator().manual_seed(2))
    prompts, sizes = torch.tensor([5, 3, 6, 2]), torch.tensor([6, 8, 2, 5])
    return TokenRows(ids, prompts, torch.arange(8) < sizes[:, None])


class Counted:
    """Counts passes through the inside of each block."""

    def __init__(self, nets):
        blocks = decoder_layers(nets.policy.causal_lm.base_model)
        self.counts = [0] * len(blocks)
        for i, block in enumerate(blocks):
            block.mlp.register_forward_hook(lambda *_, i=i: self.count(i))

    def count(self, i):
        self.counts[i] += 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_a_whole_pass(folders, kind, checkpointing):
    nets = moved(folders[kind], gradient_checkpointing=checkpointing)
    plain = rows(folders[kind])
    states = nets.reference(plain, Shaping()).lower_states
    assert states.shape == (4, 14, 32)
    found = []
    for given in (plain, plain._replace(lower_states=states)):
        nets.zero_grad()
        out = nets.actor(given, Shaping(0.7)).logprobs
        out.sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in nets.actor_parameters())])
    for whole, resumed in zip(*found, strict=True):
        assert whole.abs().max() > 0
        torch.testing.assert_close(resumed, whole, atol=1e-5, rtol=1e-5)
    # Nothing is left behind.
    assert not any("forward" in vars(b) for b in decoder_layers(nets.policy.causal_lm.base_model))


def test_the_lower_blocks_do_not_run_again(folders):
    nets = moved(folders["llama"])
    given = rows(folders["llama"])
    counted = Counted(nets)
    given = given._replace(lower_states=nets.reference(given, Shaping()).lower_states)
    # The first time, a second pass looks whether it can start in the middle.
    assert counted.counts == [1, 1, 2]
    nets.reference(given, Shaping())
    assert counted.counts == [2, 2, 3]
    nets.actor(given, Shaping())
    assert counted.counts == [2, 2, 4]
    part = given.select(torch.tensor([2, 3]))
    assert part.lower_states.shape == (2, 8, 32)
    nets.actor(part, Shaping())
    assert counted.counts == [2, 2, 5]


@pytest.mark.parametrize("lora", [Lora(4, 16.0), None])
def test_without_frozen_blocks_below_nothing_is_kept(folders, lora):
    nets = moved(folders["llama"], lora)
    assert nets.lower.depth == 0
    assert nets.reference(rows(folders["llama"]), Shaping()).lower_states is None


def test_upper_blocks_that_read_lower_keys_start_from_nothing(folders, monkeypatch):
    nets = moved(folders["llama"])
    monkeypatch.setattr(type(nets.policy.causal_lm.config), "num_kv_shared_layers", 1, raising=False)
    assert LowerBlocks(nets.policy).depth == 0


def test_states_in_several_streams_are_not_kept(folders):
    nets = moved(folders["llama"])
    blocks = decoder_layers(nets.policy.causal_lm.base_model)
    blocks[1].register_forward_hook(lambda _, args, out: out[None])
    with nets.lower.keep() as kept, suppress(RuntimeError):
        nets.policy.hidden("reference", torch.ones(2, 3, dtype=torch.long), torch.tensor([3, 2]))
    assert not kept
    assert nets.lower.depth == 0


def test_a_reference_of_its_own_shares_no_states(folders, tmp_path):
    start = helpers.tiny_model(tmp_path / "start", helpers.tiny_tokenizer(tmp_path / "start"), layers=3, seed=5)
    nets = ActorCritic(Pretrained(folders["llama"]), TOP, None, start)
    assert nets.lower.depth == 0


def test_blocks_that_hand_on_more_than_states_are_all_computed(folders):
    nets = moved(folders["llama"])
    blocks = decoder_layers(nets.policy.causal_lm.base_model)
    seen = {}
    blocks[0].mlp.register_forward_hook(lambda _, args, out: seen.update(first=out))
    blocks[2].mlp.register_forward_hook(lambda _, args, out: out + 50.0 * seen.pop("first", 0.0))
    given = rows(folders["llama"])
    found = nets.reference(given, Shaping())
    assert found.lower_states is None
    assert nets.lower.depth == 0
    torch.testing.assert_close(nets.reference(given, Shaping()).logprobs, found.logprobs)


def test_a_rollout_keeps_the_states_for_learning_alone(folders, tmp_path):
    reward = ppo_helpers.ensemble(tmp_path / "reward", folders["llama"])
    nets = ppo_helpers.with_reward(Pretrained(folders["llama"]), TOP, CriticSpec("reference"), reward)
    torch.manual_seed(0)
    maker, batch = ppo_helpers.maker(nets, folders["llama"]), ppo_helpers.prompt_batch(folders["llama"])
    learned = maker.make(batch, ppo_helpers.MeanReward(), all_sum=lambda x: x)
    watched = maker.make(batch, ppo_helpers.MeanReward())
    assert watched.rows.lower_states is None
    assert learned.rows.lower_states.shape == (*learned.rows.input_ids.shape, 32)
    whole = nets.actor(learned.rows._replace(lower_states=None), maker.shaping).logprobs
    torch.testing.assert_close(nets.actor(learned.rows, maker.shaping).logprobs, whole, atol=1e-5, rtol=1e-5)


def test_a_run_learns_what_it_would_without(folders, tmp_path, monkeypatch):
    reward = ppo_helpers.ensemble(tmp_path / "reward", folders["llama"])
    rewards = []
    for name in ("reused", "whole"):
        module = ppo_helpers.ppo_module(folders["llama"], reward, lora=TOP)
        data = ppo_helpers.prompt_data(folders["llama"], tmp_path)
        rewards.append(ppo_helpers.fit_ppo(module, data, tmp_path / name))
        assert module.networks.lower.tried == (name == "reused")
        monkeypatch.setattr("lit_vapo.models.lower_blocks._is_adapted", lambda block: True)
    assert len(rewards[0]) == 4
    for one, other in zip(*rewards, strict=True):
        for key in ("train/policy_loss", "train/kl_k3", "train/actor_grad_norm", "train/reward_mean"):
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key
