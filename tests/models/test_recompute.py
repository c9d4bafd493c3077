"""Gradient checkpointing: the same gradients, and a fraction of the memory."""

import weakref
from dataclasses import replace

import helpers
import ppo_helpers
import pytest
import torch

from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.generation import Shaping
from lit_vapo.models.pretrained import Lora, Pretrained, decoder_layers, freeze, load_backbone
from lit_vapo.models.recompute import recomputed
from lit_vapo.rewards.members.full import FullEnsemble
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.members.lora import LoraEnsemble
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Eight blocks, so that what is between them counts for little."""
    path = tmp_path_factory.mktemp("deep") / "model"
    return helpers.tiny_model(path, helpers.tiny_tokenizer(path), layers=8)


def saved_bytes(work):
    """What autograd keeps of a forward pass, each storage once, without weights; and its result."""
    kept = {}

    def keep(x):
        if not (x.is_leaf and x.requires_grad):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = work()
    return sum(storage.nbytes() for storage in kept.values()), out


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def networks(base, lora, trunk, reward):
    torch.manual_seed(0)
    nets = ppo_helpers.with_reward(base, lora, CriticSpec(trunk), reward)
    for name, parameter in nets.policy.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    torch.nn.init.ones_(nets.critic.value_head.weight)
    return nets


@pytest.mark.parametrize(("lora", "trunk"), [(Lora(4, 16.0), "lora"), (Lora(4, 16.0), "own"), (None, "own")])
def test_actor_and_critic_get_the_same_gradients_from_less_memory(deep, tmp_path, lora, trunk):
    reward = ppo_helpers.ensemble(tmp_path / "reward", deep)
    found = []
    for checkpointing in (False, True):
        nets = networks(Pretrained(deep, gradient_checkpointing=checkpointing), lora, trunk, reward)
        assert not nets.policy.training
        rows = ppo_helpers.make_rollout(nets, deep, values=False).rows

        def loss(nets=nets, rows=rows):
            # Both graphs are there before either is gone through.
            actor = nets.actor(rows, Shaping()).logprobs.sum()
            return actor + nets.values(rows, None)[rows.response_mask].square().sum()

        kept, total = saved_bytes(loss)
        total.backward()
        found.append((kept, gradients(nets), total.item()))
    (whole, expected, value), (small, got, same) = found
    assert value == same
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(got[name], gradient, atol=0, rtol=0)
    assert small < 0.45 * whole


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("kind", [lambda: LoraEnsemble(3, rank=2), lambda: HeadEnsemble(3), lambda: FullEnsemble(2)])
def test_reward_members_get_the_same_gradients_from_less_memory(deep, kind, pooling):
    ids = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(1))
    lengths, prompts = torch.tensor([24, 20, 18, 9]), torch.tensor([5, 5, 4, 4])
    found = []
    for checkpointing in (False, True):
        base = Pretrained(deep, gradient_checkpointing=checkpointing)
        head = kind()
        head.build(32)
        backbone = freeze(load_backbone(base))
        backbone = head.in_training(backbone, decoder_layers(backbone))
        for b in getattr(head, "lora_b", {}).values():
            torch.nn.init.normal_(b, std=0.1, generator=torch.Generator().manual_seed(b.shape[1]))
        model = RewardModel(FeatureSpec(base, None, pooling), head, backbone)
        kept, total = saved_bytes(lambda m=model, h=head: h.rewards(m.encode(ids, lengths, prompts)).square().sum())
        total.backward()
        found.append((kept, gradients(model)))
    (whole, expected), (small, got) = found
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=0, rtol=0)
    assert small < 0.5 * whole


def test_nothing_is_computed_again_where_no_gradient_is_wanted(deep):
    backbone = load_backbone(Pretrained(deep, gradient_checkpointing=True))
    block = decoder_layers(backbone)[0]
    with torch.no_grad(), recomputed(backbone):
        assert "forward" not in vars(block)
    with recomputed(backbone):
        assert "forward" in vars(block)
        assert "forward" not in vars(decoder_layers(backbone)[-1])
    assert "forward" not in vars(block)
    plain = load_backbone(replace(Pretrained(deep)))
    with recomputed(plain):
        assert "forward" not in vars(decoder_layers(plain)[0])


def test_layers_in_8_bits_keep_nothing_of_what_they_read(deep):
    plain, base = (load_backbone(Pretrained(deep, quantization="8bit")) for _ in range(2))
    layers = [decoder_layers(b)[0].mlp.up_proj.eval().requires_grad_(False) for b in (plain, base)]
    layers[0]._forward_hooks.clear()
    found = []
    for layer in layers:
        x = torch.randn(6, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
        read = x * 2
        out = layer(read).square().sum()
        seen = weakref.ref(read)
        del read
        found.append((seen() is None, torch.autograd.grad(out, x)[0]))
    (let_go, expected), (let_go_too, got) = found
    assert not let_go
    assert let_go_too
    torch.testing.assert_close(got, expected, atol=0, rtol=0)
