"""PPO without a critic: none is built, trained, asked, logged or exported."""

import ppo_helpers
import pytest
import torch
from helpers import concrete_subclasses
from ppo_helpers import LoneModule, fit_ppo, ppo_module, prompt_data, state

import lit_vapo.advantages
from lit_vapo.advantages.base import AdvantageEstimator
from lit_vapo.advantages.gae import Gae
from lit_vapo.advantages.rloo import Rloo
from lit_vapo.callbacks.checkpoint import RunCheckpoint
from lit_vapo.commands.export import export
from lit_vapo.functional import token_rewards
from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.generation import Sampling, Shaping
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.rewards import FunctionReward, WeightedSum
from lit_vapo.stages.ppo.experience import compute_advantages
from lit_vapo.stages.ppo.update import PPOUpdate, UpdateSettings

CRITIC_FREE = [kind for kind in concrete_subclasses(lit_vapo.advantages, AdvantageEstimator) if not kind.needs_critic]
PAIRS = Sampling(6, num_responses=2)
CRITIC_KEYS = (
    "value_loss",
    "value_clip_fraction",
    "critic_grad_norm",
    "explained_variance",
    "value_mean",
    "return_mean",
)


@pytest.fixture(scope="module")
def reward(tiny_model_dir, tmp_path_factory):
    return ppo_helpers.ensemble(tmp_path_factory.mktemp("free") / "ensemble", tiny_model_dir)


@pytest.mark.parametrize("kind", CRITIC_FREE)
def test_a_run_without_a_critic_has_no_trace_of_one(tiny_model_dir, reward, tmp_path, monkeypatch, kind):
    # Some compare named rewards.
    source = WeightedSum({"ensemble": reward, "length": FunctionReward("reward_functions:length")})
    module = ppo_module(tiny_model_dir, source, advantage=kind(), sampling=PAIRS)
    asked = []
    monkeypatch.setattr("lit_vapo.models.actor_critic.ActorCritic.values", lambda *args: asked.append(args))
    data = prompt_data(tiny_model_dir, tmp_path)
    keep = RunCheckpoint(tmp_path / "ckpt")
    rows = fit_ppo(module, data, tmp_path, limit_train_batches=2, callbacks=[keep], enable_checkpointing=True)
    assert asked == []
    assert module.networks.critic is None
    assert not [n for n, p in module.named_parameters() if "critic" in n]
    (optimizer,) = module.trainer.optimizers
    assert len(optimizer.param_groups) == 1
    assert {f"train/{key}" for key in CRITIC_KEYS} & set(rows[0]) == set()
    assert {"train/policy_loss", "train/actor_grad_norm", "train/kl_k3"} <= set(rows[0])
    assert all(p.abs().max() > 0 for n, p in module.named_parameters() if "lora_B.actor" in n)
    saved = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)
    assert not [name for name in saved["state_dict"] if "critic" in name]
    export(str(tmp_path / "ckpt" / "last.ckpt"), str(tmp_path / "policy"))
    assert (tmp_path / "policy" / "adapter_config.json").is_file()
    assert not (tmp_path / "policy" / "critic").exists()


@pytest.mark.parametrize("kind", CRITIC_FREE)
def test_what_cannot_work_is_refused_before_anything_is_loaded(reward, kind):
    nowhere = "no/such/model"
    with pytest.raises(ValueError, match=r"model.sampling.num_responses: expected at least 2, .* got 1"):
        ppo_module(nowhere, reward, advantage=kind())
    with pytest.raises(ValueError, match=rf"model.critic: expected null, since {kind.__name__} needs no critic, got"):
        ppo_module(nowhere, reward, advantage=kind(), sampling=PAIRS, critic=CriticSpec())
    with pytest.raises(ValueError, match=r"model.update.critic_warmup: expected 0, since .* needs no critic, got 2"):
        ppo_module(nowhere, reward, advantage=kind(), sampling=PAIRS, update=UpdateSettings(critic_warmup=2))


def test_values_of_no_critic_are_refused(tiny_model_dir, reward):
    nets = ppo_helpers.networks(tiny_model_dir, reward, critic=None)
    with pytest.raises(ValueError, match="values: expected networks with a critic"):
        nets.values(ppo_helpers.make_rollout(nets, tiny_model_dir, values=False).rows, None)


def test_the_first_gradient_is_that_of_reinforce_with_a_leave_one_out_baseline(tiny_model_dir, reward):
    # Σ_i A_i ∇ log π(y_i) over N tokens, worked out response by response with w of the objective in the penalty.
    nets = ppo_helpers.networks(tiny_model_dir, reward, critic=None)
    for name, parameter in nets.policy.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    options = {"prompts": ppo_helpers.PROMPTS[:2], "num_responses": 3, "objective": VarianceAware()}
    rollout = ppo_helpers.make_rollout(nets, tiny_model_dir, values=False, **options)
    experience = compute_advantages(rollout, 0.3, Rloo(), lambda x: x)
    total = [
        float(rollout.reward[i]) - 0.3 * float(rollout.kl_weight[i]) * float(rollout.log_ratio[i]) for i in range(6)
    ]
    surrogate = 0.0
    logprobs = nets.actor(rollout.rows, Shaping()).logprobs
    for i in range(6):
        others = [total[j] for j in range(i // 3 * 3, i // 3 * 3 + 3) if j != i]
        surrogate = surrogate - (total[i] - sum(others) / 2) * logprobs[i][rollout.response_mask[i]].sum()
    expected = torch.autograd.grad(surrogate / rollout.response_mask.sum(), nets.actor_parameters())
    updater = PPOUpdate(LoneModule(), nets, UpdateSettings(1, 1, max_grad_norm=1e9), Shaping())
    updater.run(experience, torch.optim.SGD(nets.actor_parameters(), lr=0.0))
    for parameter, gradient in zip(nets.actor_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


def test_actor_learns_the_same_from_the_same_advantages(tiny_model_dir, reward):
    # The critic's presence does not touch the actor: same advantages, same adapters.
    nets, free = (ppo_helpers.networks(tiny_model_dir, reward, critic=c) for c in ("reference", None))
    rollout = ppo_helpers.make_rollout(nets, tiny_model_dir, num_responses=2)
    rewards = token_rewards(
        rollout.reward, rollout.logprobs - rollout.ref_logprobs, rollout.kl_weight, 0.1, rollout.response_mask
    )
    advantages = Rloo()(rewards, None, rollout.response_mask, 2, lambda x: x).advantages
    with_critic = compute_advantages(rollout, 0.1, Gae(), lambda x: x)._replace(advantages=advantages)
    without = compute_advantages(rollout, 0.1, Rloo(), lambda x: x)
    for networks, experience in ((nets, with_critic), (free, without)):
        torch.manual_seed(3)
        updater = PPOUpdate(LoneModule(), networks, UpdateSettings(2, 2), Shaping())
        updater.run(experience, ppo_helpers.optimizer(networks, 1e-3))
    for name, value in state(free).items():
        assert torch.equal(state(nets)[name], value), name
