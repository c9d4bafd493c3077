"""What steers and stops a PPO run: targets and budgets of the KL, and anything that is not finite."""

import ppo_helpers
import pytest
import torch
from ppo_helpers import fit_ppo, ppo_module, prompt_data, state

import lit_vapo.stages.ppo.module as module_under_test
from lit_vapo.callbacks.checkpoint import RunCheckpoint
from lit_vapo.functional import kl_k3
from lit_vapo.objectives.base import Objective, Score
from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.stages.ppo.control import KLControl
from lit_vapo.stages.ppo.update import PPOUpdate, UpdateSettings


@pytest.fixture(scope="module")
def reward(tiny_model_dir, tmp_path_factory):
    return ppo_helpers.ensemble(tmp_path_factory.mktemp("control") / "ensemble", tiny_model_dir)


# Resumed runs write elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


# 1. Adaptive β.


@pytest.mark.parametrize(
    ("kl", "iteration", "iterations", "expected"),
    [
        (9.0, 100, 100, 0.51),  # far above: 0.2 of the error at Ziegler's gain of 0.1
        (9.0, 500, 1000, 0.51),  # a longer run has no smaller gain
        (9.0, 20, 20, 0.55),  # gain 10/20
        (0.0, 5, 5, 0.4),  # gain 1 at most
        (1.0, 5, 20, 0.5),  # half of the way up: the target is 2 * 5/10 = 1, and reached
        (1.0, 10, 20, 0.45),  # half of the target where all of it is due
    ],
)
def test_the_next_coefficient_by_hand(kl, iteration, iterations, expected):
    control = KLControl(0.5, target=2.0)
    control.adapt(torch.tensor(kl), iteration, iterations)
    torch.testing.assert_close(control.coef, torch.tensor(expected))


def test_without_a_target_the_coefficient_stays():
    control = KLControl(0.3)
    control.adapt(torch.tensor(9.0), 1, 10)
    assert control.coef == torch.tensor(0.3)


# A policy whose KL answers the price with a delay, as KL = 1/β at rest: from any β, a short run ends near the target.
@pytest.mark.parametrize("start", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("iterations", [20, 50, 200])
def test_a_short_run_ends_near_its_target_and_hardly_passes_it(start, iterations):
    control, kl, most = KLControl(start, target=1.0), 0.0, 0.0
    for i in range(1, iterations + 1):
        kl += (1 / float(control.coef) - kl) * 5 / iterations
        most = max(most, kl)
        control.adapt(torch.tensor(kl), i, iterations)
    assert 0.6 < kl < 1.5
    if start == 1.0:
        assert most < 1.3


class Tamper(Objective):
    """The mean reward, made NaN from some call on."""

    def __init__(self, at=3):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, estimate):
        self.calls += 1
        reward = estimate.mean.clone()
        if self.calls == self.at:
            reward[1] = float("nan")
        return Score(reward, torch.ones_like(reward))


def checkpointed(folder, **kwargs):
    return {"callbacks": [RunCheckpoint(folder, every_iterations=1, **kwargs)], "enable_checkpointing": True}


def weights(path):
    saved = torch.load(path, weights_only=True)["state_dict"]
    return {n: x for n, x in saved.items() if "lora_" in n or "value_head" in n}


# 2. The budget.


def test_a_policy_over_its_budget_is_not_updated_and_the_run_ends_well(tiny_model_dir, reward, tmp_path, caplog):
    module = ppo_module(tiny_model_dir, reward, kl_budget=1e-3)
    data = prompt_data(tiny_model_dir, tmp_path, count=32, validation_fraction=0.25)
    options = {"max_epochs": 3, "limit_val_batches": 1, "val_check_interval": 1.0, **checkpointed(tmp_path / "ckpt")}
    rows = fit_ppo(module, data, tmp_path, **options)
    updates = [row["train/updates"] for row in rows]
    # The first iteration starts at KL 0; the second finds that the first has gone too far, and is the last.
    assert updates == [4, 0]
    assert rows[0]["train/kl_k3"] <= 1e-3 < rows[1]["train/kl_k3"]
    kl = f"{rows[1]['train/kl_k3']:.4g}"
    expected = f"iteration 2: the KL to the reference is {kl} nats per response (k3), above model.kl_budget = 0.001"
    assert expected in caplog.text
    # A validation, and the checkpoint that any run ends with; it loads and goes on under a larger budget.
    assert "val/kl_k3" in module.trainer.callback_metrics
    last = tmp_path / "ckpt" / "last.ckpt"
    assert all(torch.equal(x, module.state_dict()[n]) for n, x in weights(last).items())
    again = ppo_module(tiny_model_dir, reward, kl_budget=1e3)
    options = {"max_epochs": 2, **checkpointed(tmp_path / "again")}
    more = fit_ppo(again, data, tmp_path, last, **options)
    assert more[0]["train/iteration"] > 2
    assert more[-1]["train/updates"] == 4


def test_a_budget_that_is_kept_changes_nothing(tiny_model_dir, reward, tmp_path):
    states = []
    for budget in (None, 1e3):
        module = ppo_module(tiny_model_dir, reward, kl_budget=budget)
        fit_ppo(module, prompt_data(tiny_model_dir, tmp_path), tmp_path, limit_train_batches=2)
        states.append(state(module))
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def test_with_a_minimum_of_epochs_the_policy_still_stays_where_it_is(tiny_model_dir, reward, tmp_path):
    module = ppo_module(tiny_model_dir, reward, kl_budget=1e-6)
    rows = fit_ppo(module, prompt_data(tiny_model_dir, tmp_path), tmp_path, min_epochs=1)
    assert [row["train/updates"] for row in rows] == [4, 0, 0, 0]


def test_the_kl_of_target_and_budget_is_plain_and_of_whole_responses(tiny_model_dir, reward, tmp_path, monkeypatch):
    seen, compute = [], module_under_test.global_kl

    def watched(rollout, all_sum):
        seen.append((rollout, compute(rollout, all_sum)))
        return seen[-1][1]

    monkeypatch.setattr(module_under_test, "global_kl", watched)
    fit_ppo(ppo_module(tiny_model_dir, reward), prompt_data(tiny_model_dir, tmp_path), tmp_path, limit_train_batches=2)
    rollout, kl = seen[-1]
    k3 = []
    for i in range(len(rollout.reward)):
        size = int(rollout.response_mask[i].sum())
        k3.append(float(kl_k3((rollout.logprobs[i, :size] - rollout.ref_logprobs[i, :size]).sum())))
    assert float(kl) == pytest.approx(sum(k3) / len(k3), rel=1e-4)
    assert float(kl) > 0
    # Two processes of which the other has the same sum over as many rows: the same mean.
    assert float(compute(rollout, lambda x: 2 * x)) == pytest.approx(float(kl))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_budget": 0.0}, "model.kl_budget: expected a number above 0, got 0"),
        ({"kl_target": 2.0, "kl_budget": 2.0}, "model.kl_budget: expected more than model.kl_target = 2.0, got 2.0"),
        ({"kl_target": 2.0, "kl_coef": 0.0}, "model.kl_coef: expected a number above 0 to adapt to model.kl_target"),
        ({"kl_coef": float("nan")}, "model.kl_coef: expected a number of 0 or more, got nan"),
    ],
)
def test_targets_that_make_no_sense_are_refused(tiny_model_dir, reward, options, message):
    with pytest.raises(ValueError, match=message):
        ppo_module(tiny_model_dir, reward, **options)


# 3. Nothing that is not finite reaches the weights or a checkpoint.


def poisoned(kind, model, reward):
    """A module that goes wrong in iteration 3, in one place."""
    module = ppo_module(model, reward, objective=Tamper() if kind == "reward" else MeanReward())
    if kind == "reward":
        return module
    learn, advantage, backward = module._learn, module.advantage, module.manual_backward

    class Advantage:
        def __call__(self, *args):
            out = advantage(*args)
            if module.iteration == 3:
                out.advantages[0, 0] = float("inf")
            return out

        needs_critic = True

    def spoilt_learn(rollout):
        if module.iteration == 3:
            rollout.logprobs[0, 0] = float("nan")
        return learn(rollout)

    def spoilt_backward(loss):
        backward(loss)
        if module.iteration == 3:
            module.networks.critic_parameters()[0].grad[0] = float("nan")

    if kind == "advantage":
        module.advantage = Advantage()
    elif kind == "log-probability":
        module._learn = spoilt_learn
    elif kind == "gradient":
        module.manual_backward = spoilt_backward
    return module


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("reward", "iteration 3: reward: expected finite numbers, got 1 that are NaN or infinite; no step was taken"),
        ("log-probability", "iteration 3: logprobs: expected finite numbers, got 1"),
        ("advantage", "iteration 3: advantages: expected finite numbers, got 1"),
        ("loss", "iteration 3: value_loss: expected a finite number, got nan; no step was taken"),
        ("gradient", "iteration 3: critic_grad_norm: expected a finite number, got nan; no step was taken"),
    ],
)
def test_nan_stops_before_the_step_and_the_last_good_checkpoint_stays(
    tiny_model_dir, reward, tmp_path, monkeypatch, kind, message
):
    module = poisoned(kind, tiny_model_dir, reward)
    if kind == "loss":
        compute = PPOUpdate._loss

        def spoilt(self, part, train_actor):
            loss, terms = compute(self, part, train_actor)
            if module.iteration == 3:
                terms["value_loss"] = terms["value_loss"] * float("nan")
            return loss, terms

        monkeypatch.setattr(PPOUpdate, "_loss", spoilt)
    data = prompt_data(tiny_model_dir, tmp_path)
    module.update = UpdateSettings(epochs=1, minibatches=1)
    options = {"limit_train_batches": 1, "max_epochs": 5}
    with pytest.raises(ValueError, match=message):
        fit_ppo(module, data, tmp_path, **options, **checkpointed(tmp_path / "ckpt"))
    monkeypatch.undo()
    # No step of iteration 3 was taken: module and checkpoint have the weights of iteration 2.
    last = tmp_path / "ckpt" / "last.ckpt"
    saved = weights(last)
    assert saved
    assert all(torch.isfinite(x).all() for x in saved.values())
    assert all(torch.equal(x, module.state_dict()[n]) for n, x in saved.items())
    again = ppo_module(tiny_model_dir, reward, objective=MeanReward(), update=UpdateSettings(1, 1))
    rows = fit_ppo(again, data, tmp_path, last, **options, **checkpointed(tmp_path / "again"))
    assert rows[0]["train/iteration"] == 3


def test_weights_that_are_not_finite_are_never_written(tiny_model_dir, reward, tmp_path):
    # Finite gradients and yet a step into nowhere: what was saved before stays as it was.
    module = ppo_module(tiny_model_dir, reward)
    data = prompt_data(tiny_model_dir, tmp_path)
    fit_ppo(module, data, tmp_path, limit_train_batches=1, **checkpointed(tmp_path / "ckpt"))
    before = (tmp_path / "ckpt" / "last.ckpt").read_bytes()
    module.networks.actor_parameters()[0].data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"expected finite weights, got NaN or infinity in .*; not saved"):
        module.trainer.save_checkpoint(tmp_path / "ckpt" / "last.ckpt")
    assert (tmp_path / "ckpt" / "last.ckpt").read_bytes() == before
