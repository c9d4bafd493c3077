"""What rewards add to a plan: heads, adapters on the policy's base, models of their own, public models."""

import pytest
import torch
from public_helpers import classifier

from lit_vapo.models.pretrained import Lora, Pretrained, decoder_layers, freeze, load_backbone
from lit_vapo.plan.draft import Setup, planned
from lit_vapo.plan.ppo import PPOJob, draft_ppo
from lit_vapo.rewards import load_reward
from lit_vapo.rewards.combined import WeightedSum
from lit_vapo.rewards.members.full import FullEnsemble
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.members.lora import LoraEnsemble
from lit_vapo.rewards.pretrained import PretrainedRewards
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel

SETUP = Setup()


@pytest.fixture
def plan(tiny_model_dir):
    def call(reward, setup=SETUP):
        sizes = {"prompts": 4, "responses": 1, "prompt_length": 12, "new": 4}
        learning = {"epochs": 1, "minibatches": 2, "micro_batch_tokens": 64}
        job = PPOJob(Pretrained(tiny_model_dir), Lora(rank=4), None, reward, None, **sizes, **learning)
        return planned(draft_ppo(job, setup), setup)

    return call


@pytest.fixture
def saved(tiny_model_dir, tmp_path):
    """The folder of an ensemble on the tiny model, as it was drawn."""

    def call(head):
        spec = FeatureSpec(Pretrained(tiny_model_dir))
        backbone = freeze(load_backbone(spec.base))
        head.build(32)
        model = RewardModel(spec, head, head.attach(backbone, decoder_layers(backbone)))
        model.save_pretrained(tmp_path / "ensemble")
        return load_reward(str(tmp_path / "ensemble"))

    return call


def added(more, less):
    """Bytes of weights and FLOPs of scoring that one plan has more than another."""
    (a, b) = (p.draft for p in (more, less))
    return a.weights - b.weights, a.phases[1].flops - b.phases[1].flops


def test_heads_on_the_base_take_their_own_weights_and_no_pass(plan, saved):
    weights, flops = added(plan(saved(HeadEnsemble(5))), plan(None))
    # The features of the reference's pass are pooled; the heads themselves are held by their source.
    assert 0 <= weights < 5 * 33 * 4 + 200
    assert flops == 0


def test_adapters_on_the_base_take_a_pass_for_each_member(plan, saved):
    source = saved(LoraEnsemble(3, rank=2))
    weights, flops = added(plan(source), plan(None))
    adapters = sum(p.numel() * 4 for p in source.head.parameters())
    assert adapters <= weights < adapters + 200
    # Three passes without the head, where policy and reference are two with it.
    assert flops > 0.8 * plan(None).draft.phases[1].flops


def test_members_with_backbones_hold_them(plan, saved, tiny_model_dir):
    weights, _ = added(plan(saved(FullEnsemble(2))), plan(None))
    backbone = load_backbone(Pretrained(tiny_model_dir, dtype="float32"))
    one = sum(p.numel() * 4 for p in backbone.parameters())
    assert 2 * one <= weights < 2 * one + 1000


def test_public_models_and_sums_are_counted_once_each(plan, tmp_path):
    paths = [classifier(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    one = plan(PretrainedRewards([Pretrained(paths[0])]))
    two = plan(WeightedSum({name: PretrainedRewards([Pretrained(p)]) for name, p in zip("ab", paths, strict=True)}))
    first, flops = added(one, plan(None))
    both, twice = added(two, plan(None))
    assert first > 0
    assert both == pytest.approx(2 * first, rel=0.01)
    assert twice == 2 * flops > 0


def test_reward_models_stay_whole_where_the_policy_is_cut(plan, saved):
    source = saved(FullEnsemble(2))
    whole, cut = plan(source), plan(source, Setup(2, sharded=True))
    reward = added(whole, plan(None))[0]
    assert cut.phases["scoring"]["weights"] > reward
    assert cut.draft.whole >= reward


def test_real_weights_are_as_they_were_after_a_plan(plan, saved):
    source = saved(HeadEnsemble(5))
    plan(source)
    again = load_reward(source.folder)
    again.prepare(None)
    assert all(torch.isfinite(p).all() for p in again.head.parameters())
