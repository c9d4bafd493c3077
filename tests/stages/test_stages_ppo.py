"""The PPO stage as a Lightning module: learning, resuming, evaluating, refusing."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ddp_worker
import ppo_helpers
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from ppo_helpers import fit_ppo, ppo_module, prompt_data, state

from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.generation import Sampling
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.rewards.placement import SharedTrunk
from lit_vapo.rewards.reward_model import RewardModel
from lit_vapo.stages.ppo.update import UpdateSettings


@pytest.fixture(scope="module")
def reward(tiny_model_dir, tmp_path_factory):
    return ppo_helpers.ensemble(tmp_path_factory.mktemp("ppo") / "ensemble", tiny_model_dir)


def test_two_processes_learn_what_one_does(tiny_model_dir, reward, tmp_path):
    # Six rows of unequal length, dealt out to two processes: whitening, loss and clipping are over all tokens.
    nets = ppo_helpers.networks(tiny_model_dir, reward, critic="lora")
    rollout = ppo_helpers.make_rollout(nets, tiny_model_dir, seed=1, objective=VarianceAware())
    # Random adapters start where the reference is; the penalty should count.
    rollout.ref_logprobs = rollout.ref_logprobs - 0.5
    ddp_worker.save_rollout(tmp_path / "rollout.pt", rollout)
    parts = [ddp_worker.load_rollout(tmp_path / "rollout.pt", rank, 2) for rank in (0, 1)]
    assert len({int(part.response_mask.sum()) for part in parts}) == 2
    assert len({float(part.kl_weight.mean()) for part in parts}) == 2
    command = [sys.executable, ddp_worker.__file__, tiny_model_dir, reward, str(tmp_path)]
    tests = Path(ddp_worker.__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1"}
    other = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ddp_worker.run(tiny_model_dir, reward, tmp_path)
    output, _ = other.communicate(timeout=120)
    assert other.returncode == 0, output
    one, report = torch.load(tmp_path / "world_1.pt", weights_only=True)
    two, again = torch.load(tmp_path / "world_2.pt", weights_only=True)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=0, msg=name)
    for name, value in report.items():
        torch.testing.assert_close(again[name], value, atol=1e-5, rtol=1e-4, msg=name)


# A direction at random may well reward an end.
@pytest.mark.filterwarnings("ignore:finished responses are rewarded")
def test_a_planted_reward_rises(tiny_model_dir, reward, tmp_path):
    class Planted(Callback):
        """Every member rewards the same direction of the mean hidden state."""

        def on_fit_start(self, trainer, pl_module):
            head = pl_module.reward.model.head
            # Before anything has been asked for.
            spec = replace(pl_module.reward.model.spec, pooling="mean")
            pl_module.reward.put(SharedTrunk(RewardModel(spec, head, None)))
            direction = torch.randn(32, generator=torch.Generator().manual_seed(4))
            head.weight.data[:] = direction
            head.bias.data.zero_()
            head.reward_loc.zero_()
            head.reward_scale.fill_(1.0)

    settings = UpdateSettings(epochs=4, minibatches=2)
    module = ppo_module(
        tiny_model_dir, reward, lora=None, update=settings, kl_coef=0.0, critic=CriticSpec(warm_start=False)
    )
    data = prompt_data(tiny_model_dir, tmp_path, count=480, batch_size=32)
    rows = fit_ppo(module, data, tmp_path, callbacks=[Planted()])
    means = [row["train/reward_mean"] for row in rows]
    assert len(means) == 15
    first, last = sum(means[:3]) / 3, sum(means[-3:]) / 3
    assert last > first + 1.0 * rows[0]["train/reward_std"], means
    assert rows[-1]["train/kl_k3"] > 1


def test_bf16_mixed_precision_learns(tiny_model_dir, reward, tmp_path):
    module = ppo_module(tiny_model_dir, reward)
    rows = fit_ppo(
        module, prompt_data(tiny_model_dir, tmp_path), tmp_path, precision="bf16-mixed", limit_train_batches=2
    )
    assert all(row["train/actor_grad_norm"] > 0 for row in rows)
    assert rows[0]["train/first_ratio"] == pytest.approx(1, abs=0.02)
    assert all(math.isfinite(v) for row in rows for v in row.values())
    trained = {n: p for n, p in module.named_parameters() if "lora_B.actor" in n}
    assert trained
    assert all(p.abs().max() > 0 for p in trained.values())


def test_fp16_mixed_precision_is_refused(tiny_model_dir, reward, tmp_path, monkeypatch):
    # Lightning itself turns it into bf16-mixed on a CPU.
    monkeypatch.setattr(Trainer, "precision", property(lambda self: "16-mixed"))
    with pytest.raises(ValueError, match=r"trainer.precision: expected 32-true or bf16-mixed, got 16-mixed"):
        fit_ppo(ppo_module(tiny_model_dir, reward), prompt_data(tiny_model_dir, tmp_path), tmp_path)


@pytest.mark.parametrize("max_approx_kl", [None, 1e-9])
def test_learning_rate_ends_at_the_planned_number_of_updates(tiny_model_dir, reward, tmp_path, max_approx_kl):
    # 8 weight updates are 2 iterations of 2 × 2: the rate is 1, then 1/2. Nothing is learned at a rate of 0, so the run
    # ends there as well where updates end early and steps are left over.
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    data = prompt_data(tiny_model_dir, tmp_path)
    update = UpdateSettings(epochs=2, minibatches=2, max_approx_kl=max_approx_kl)
    module = ppo_module(tiny_model_dir, reward, update=update)
    fit_ppo(module, data, tmp_path, callbacks=[Rates()], max_steps=8, max_epochs=-1)
    assert rates == pytest.approx([1e-2, 0.5e-2])


@pytest.mark.parametrize(("target", "direction"), [(1e-4, 1), (1e4, -1)])
def test_adaptive_kl_coefficient_moves_towards_its_target(tiny_model_dir, reward, tmp_path, target, direction):
    # Error limited to a fifth; 3 iterations are fewer than 10, so the gain is 1: a factor of 1 ± 0.2 an iteration.
    module = ppo_module(tiny_model_dir, reward, kl_coef=0.1, kl_target=target)
    rows = fit_ppo(module, prompt_data(tiny_model_dir, tmp_path), tmp_path, limit_train_batches=3)
    coefficients = [row["train/kl_coef"] for row in rows] + [float(module.kl.coef)]
    # In the first iteration policy and reference are the same: KL 0, below any target.
    assert coefficients[1] / coefficients[0] == pytest.approx(0.8, rel=1e-6)
    assert coefficients[3] / coefficients[2] == pytest.approx(1 + direction * 0.2, rel=1e-6)


def test_a_run_longer_than_the_context_is_refused(tiny_model_dir, reward, tmp_path):
    module = ppo_module(tiny_model_dir, reward, sampling=Sampling(100))
    with pytest.raises(ValueError, match=r"expected at most the model's context of 128 tokens, got a sequence of 148"):
        fit_ppo(module, prompt_data(tiny_model_dir, tmp_path), tmp_path)


def test_plain_loaders_are_refused(tiny_model_dir, reward, tmp_path):
    loader = prompt_data(tiny_model_dir, tmp_path).train_dataloader()
    with pytest.raises(ValueError, match=r"expected a PromptDataModule"):
        ppo_helpers.trainer(tmp_path).fit(ppo_module(tiny_model_dir, reward), loader, loader)


def test_critic_warmup_is_in_force_in_the_first_iterations_only(tiny_model_dir, reward, tmp_path):
    module = ppo_module(tiny_model_dir, reward, update=UpdateSettings(1, 1, critic_warmup=1))
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            actor = {n: p for n, p in state(pl_module).items() if "lora_B" in n}
            seen.append(max(p.abs().max().item() for p in actor.values()))

    fit_ppo(module, prompt_data(tiny_model_dir, tmp_path), tmp_path, callbacks=[Watch()], limit_train_batches=2)
    assert seen[0] == 0
    assert seen[1] > 0


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("kl_coef", -0.1, "model.kl_coef: expected a number of 0 or more, got -0.1"),
        ("kl_target", 0.0, "model.kl_target: expected a number above 0"),
        ("learning_rate", 0.0, "model.learning_rate: expected a number above 0"),
        ("reward_clip", -1.0, "model.reward_clip: expected a number above 0"),
    ],
)
def test_options_out_of_range_are_refused(tiny_model_dir, reward, option, value, expected):
    with pytest.raises(ValueError, match=expected):
        ppo_module(tiny_model_dir, reward, **{option: value})


def test_one_member_is_refused_before_anything_is_loaded(tiny_model_dir, tmp_path):
    reward = ppo_helpers.ensemble(tmp_path / "one", tiny_model_dir, members=1)
    with pytest.raises(ValueError, match=r"expected at least 2 members, got 1"):
        ppo_module(str(Path("nowhere")), reward, objective=VarianceAware())
