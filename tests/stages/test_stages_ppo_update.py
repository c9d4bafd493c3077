"""The learning half of PPO: true minibatches, global token counts, early stops."""

import ppo_helpers
import pytest
import torch
from ppo_helpers import LoneModule, state

from lit_vapo.advantages.gae import Gae
from lit_vapo.models.generation import Shaping
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.stages.ppo.experience import compute_advantages
from lit_vapo.stages.ppo.update import PPOUpdate, UpdateSettings


@pytest.fixture(scope="module")
def reward(tiny_model_dir, tmp_path_factory):
    return ppo_helpers.ensemble(tmp_path_factory.mktemp("update") / "ensemble", tiny_model_dir)


def updated(model, reward, settings, change=lambda e: e, lr=1e-2, train_actor=True, **kwargs):
    """Networks after one update from a fixed rollout, what it reported, and the state before."""
    nets = ppo_helpers.networks(model, reward, **kwargs)
    experience = change(ppo_helpers.make_experience(nets, model))
    before = state(nets)
    torch.manual_seed(7)
    updater = PPOUpdate(LoneModule(), nets, settings, Shaping())
    report = updater.run(experience, ppo_helpers.optimizer(nets, lr), train_actor)
    return nets, report, before


def changed(before, nets, part):
    after = state(nets)
    return {n for n in before if part in n and not torch.equal(before[n], after[n])}


def test_the_first_minibatch_has_ratio_one(tiny_model_dir, reward):
    _, report, _ = updated(tiny_model_dir, reward, UpdateSettings(2, 3, micro_batch_tokens=40))
    assert report["first_ratio"].item() == pytest.approx(1, abs=1e-5)
    assert report["first_ratio_max"].item() == pytest.approx(1, abs=1e-5)
    assert report["ratio_max"] > 1.001


def test_every_minibatch_is_a_weight_update(tiny_model_dir, reward):
    # 3 epochs × 2 minibatches = 6 updates: 7 different states, seen from inside the forward passes.
    nets = ppo_helpers.networks(tiny_model_dir, reward)
    settings = UpdateSettings(epochs=3, minibatches=2, micro_batch_tokens=20)
    experience = ppo_helpers.make_experience(nets, tiny_model_dir)
    seen, actor = [], nets.actor

    def spy(rows, temperature):
        seen.append(torch.cat([p.detach().flatten() for p in nets.actor_parameters()]))
        return actor(rows, temperature)

    nets.actor = spy
    report = PPOUpdate(LoneModule(), nets, settings, Shaping()).run(experience, ppo_helpers.optimizer(nets))
    assert len(seen) > 6  # several microbatches a minibatch
    final = torch.cat([p.detach().flatten() for p in nets.actor_parameters()])
    assert len(torch.stack([*seen, final]).unique(dim=0)) == 7
    assert report["updates"].item() == 6


def test_an_epoch_sees_each_row_once_and_epochs_are_shuffled_apart(tiny_model_dir, reward):
    nets = ppo_helpers.networks(tiny_model_dir, reward)
    settings = UpdateSettings(epochs=2, minibatches=3)
    experience = ppo_helpers.make_experience(nets, tiny_model_dir)
    updater, seen = PPOUpdate(LoneModule(), nets, settings, Shaping()), []
    accumulate = updater._accumulate
    updater._accumulate = lambda part, *rest: seen.append(part.rows) or accumulate(part, *rest)
    torch.manual_seed(0)
    updater.run(experience, ppo_helpers.optimizer(nets))
    ids = [[row[:n].tolist() for row, n in zip(r.input_ids, r.lengths, strict=True)] for r in (*seen, experience.rows)]
    one, two, everything = [[row for part in parts for row in part] for parts in (ids[:3], ids[3:6], ids[6:])]
    assert sorted(one) == sorted(two) == sorted(everything)
    assert one != two


@pytest.mark.parametrize("tokens", [1, 30, 64])
def test_microbatches_do_not_change_the_result(tiny_model_dir, reward, tokens):
    whole, report, _ = updated(tiny_model_dir, reward, UpdateSettings(2, 2), lr=1e-3)
    parts, again, _ = updated(tiny_model_dir, reward, UpdateSettings(2, 2, micro_batch_tokens=tokens), lr=1e-3)
    for name, value in state(whole).items():
        torch.testing.assert_close(state(parts)[name], value, atol=1e-5, rtol=0, msg=name)
    for name, value in report.items():
        torch.testing.assert_close(again[name], value, atol=1e-4, rtol=1e-4, msg=name)


def test_nan_in_padding_is_harmless(tiny_model_dir, reward):
    def poison(experience):
        mask = experience.rows.response_mask
        assert not mask.all()
        nan = torch.tensor(float("nan"))
        changed = {n: torch.where(mask, getattr(experience, n), nan) for n in ("logprobs", "advantages", "returns")}
        return experience._replace(**changed, values=torch.where(mask, experience.values, nan))

    settings = UpdateSettings(1, 2)
    clean, _, _ = updated(tiny_model_dir, reward, settings)
    poisoned, _, _ = updated(tiny_model_dir, reward, settings, poison)
    for name, value in state(clean).items():
        assert torch.equal(state(poisoned)[name], value), name


def test_a_loss_that_is_not_finite_takes_no_step(tiny_model_dir, reward):
    nets = ppo_helpers.networks(tiny_model_dir, reward)
    experience = ppo_helpers.make_experience(nets, tiny_model_dir)
    experience.advantages[2, 0] = float("nan")
    before = state(nets)
    with pytest.raises(ValueError, match=r"policy_loss: expected a finite number, got nan; no step was taken"):
        PPOUpdate(LoneModule(), nets, UpdateSettings(1, 1), Shaping()).run(experience, ppo_helpers.optimizer(nets))
    assert not changed(before, nets, "")


def test_infinite_gradients_take_no_step(tiny_model_dir, reward):
    nets = ppo_helpers.networks(tiny_model_dir, reward)
    experience = ppo_helpers.make_experience(nets, tiny_model_dir)
    module = LoneModule()

    def overflow(loss):
        loss.backward()
        nets.actor_parameters()[0].grad[0, 0] = float("inf")

    module.manual_backward = overflow
    before = state(nets)
    with pytest.raises(ValueError, match=r"actor_grad_norm: expected a finite number, got inf; no step"):
        PPOUpdate(module, nets, UpdateSettings(1, 1), Shaping()).run(experience, ppo_helpers.optimizer(nets))
    assert not changed(before, nets, "")


def test_too_large_a_move_stops_the_passes(tiny_model_dir, reward):
    _, report, _ = updated(tiny_model_dir, reward, UpdateSettings(4, 2, max_approx_kl=1e-3), lr=0.1)
    assert 1 <= report["updates"].item() < 8
    assert report["approx_kl"] > 0
    _, report, _ = updated(tiny_model_dir, reward, UpdateSettings(4, 2, max_approx_kl=1e3), lr=0.1)
    assert report["updates"].item() == 8


def test_critic_warmup_leaves_the_actor_alone(tiny_model_dir, reward):
    nets, _, before = updated(tiny_model_dir, reward, UpdateSettings(1, 2), train_actor=False)
    assert changed(before, nets, "value_head") == {"critic.value_head.weight", "critic.value_head.bias"}
    assert not changed(before, nets, "policy")


def test_a_critic_s_adapters_end_where_it_reads(tiny_model_dir, tmp_path):
    reward = ppo_helpers.ensemble(tmp_path / "ensemble", tiny_model_dir, layer=1)
    nets, _, before = updated(tiny_model_dir, reward, UpdateSettings(1, 1), critic="lora")
    assert changed(before, nets, "lora_B.critic") == {n for n in before if "lora_B.critic" in n} != set()
    assert not [n for n in before if ".critic." in n and "layers.1." in n]


@pytest.mark.parametrize(
    ("trunk", "own"),
    [("reference", "value_head"), ("lora", "lora_B.critic"), ("own", "critic.trunk")],
)
def test_every_critic_trains(tiny_model_dir, reward, trunk, own):
    nets, _, before = updated(tiny_model_dir, reward, UpdateSettings(1, 2), critic=trunk)
    assert changed(before, nets, own) == {n for n in before if own in n} != set()
    assert changed(before, nets, "value_head")
    assert changed(before, nets, "lora_B.actor") == {n for n in before if "lora_B.actor" in n}


def test_a_critic_tapped_in_the_middle_trains_all_it_holds(tiny_model_dir, tmp_path):
    # The ensemble reads after block 1 of 2: so does a trunk of the critic's own, which then needs no block 2.
    reward = ppo_helpers.ensemble(tmp_path / "ensemble", tiny_model_dir, layer=1)
    nets, _, before = updated(tiny_model_dir, reward, UpdateSettings(1, 1), critic="own")
    assert changed(before, nets, "critic.") == {n for n in before if n.startswith("critic.")}
    linear = ppo_helpers.networks(tiny_model_dir, reward, critic="own")
    rollout = ppo_helpers.make_rollout(linear, tiny_model_dir)
    last = rollout.response_mask.sum(1) - 1
    # Before the last token the state differs from the one at it, so only the reference's own states compare.
    shared = ppo_helpers.networks(tiny_model_dir, reward, critic="reference")
    states = shared.reference(rollout.rows, Shaping()).value_states
    rows = torch.arange(len(last))
    torch.testing.assert_close(
        linear.values(rollout.rows, None)[rows, last], shared.values(rollout.rows, states)[rows, last]
    )


def test_warm_start_is_the_mean_reward(tiny_model_dir, reward):
    nets = ppo_helpers.networks(tiny_model_dir, reward)
    states = torch.randn(5, 1, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(nets.critic(states)[:, 0], nets.scorer.model.head(states[:, 0]).mean)
    cold = ppo_helpers.networks(tiny_model_dir, reward, warm_start=False)
    assert torch.equal(cold.critic(states), torch.zeros(5, 1))


def test_heads_that_read_means_start_no_critic(tiny_model_dir, tmp_path):
    # Of one state they know little: on the demo's task such a critic explained less than none.
    folder = ppo_helpers.ensemble(tmp_path / "means", tiny_model_dir, pooling="mean")
    states = torch.randn(5, 1, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ppo_helpers.networks(tiny_model_dir, folder).critic(states), torch.zeros(5, 1))


def test_full_fine_tuning_trains_the_policy_and_not_its_copy(tiny_model_dir, reward):
    nets = ppo_helpers.networks(tiny_model_dir, reward, lora=False)
    frozen = {n: p.clone() for n, p in nets.policy.reference_lm.named_parameters()}
    before = state(nets)
    experience = ppo_helpers.make_experience(nets, tiny_model_dir)
    PPOUpdate(LoneModule(), nets, UpdateSettings(1, 2), Shaping()).run(experience, ppo_helpers.optimizer(nets, 1e-3))
    assert len(changed(before, nets, "policy.lm")) > 10
    assert all(torch.equal(p, frozen[n]) for n, p in nets.policy.reference_lm.named_parameters())


def test_gradients_are_clipped_for_actor_and_critic_apart(tiny_model_dir, reward):
    nets = ppo_helpers.networks(tiny_model_dir, reward)
    experience = ppo_helpers.make_experience(nets, tiny_model_dir)
    experience = experience._replace(returns=experience.returns + 1e4)
    settings = UpdateSettings(1, 1, value_clip_range=None, max_grad_norm=0.5)
    report = PPOUpdate(LoneModule(), nets, settings, Shaping()).run(
        experience, torch.optim.SGD(nets.parameters(), lr=0.0)
    )

    def norm(parameters):
        return torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item()

    assert report["critic_grad_norm"] > 100
    assert norm(nets.critic_parameters()) == pytest.approx(0.5, rel=1e-3)
    assert norm(nets.actor_parameters()) == pytest.approx(min(0.5, report["actor_grad_norm"].item()), rel=1e-3)


def test_entropy_bonus_raises_the_entropy(tiny_model_dir, reward):
    entropies = []
    for coefficient in (0.0, 5.0):
        settings = UpdateSettings(4, 1, entropy_coef=coefficient)
        nets, _, _ = updated(tiny_model_dir, reward, settings)
        rollout = ppo_helpers.make_rollout(ppo_helpers.networks(tiny_model_dir, reward), tiny_model_dir)
        out = nets.actor(rollout.rows, Shaping())
        entropies.append(out.entropy[rollout.response_mask].mean().item())
    assert entropies[1] > entropies[0] + 0.01


def test_mixed_precision_sees_each_minibatch_s_own_weights(tiny_model_dir, reward):
    # Autocast caches casts of the weights inside one training step; a stale cast gives ratio 1 for ever.
    settings = UpdateSettings(1, 3)
    nets = ppo_helpers.networks(tiny_model_dir, reward)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        experience = ppo_helpers.make_experience(nets, tiny_model_dir)
        report = PPOUpdate(LoneModule(), nets, settings, Shaping()).run(experience, ppo_helpers.optimizer(nets, 0.05))
        rows = experience.rows
        inside = nets.actor(rows, Shaping()).logprobs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = nets.actor(rows, Shaping()).logprobs
    torch.testing.assert_close(inside, outside)
    assert (inside - experience.logprobs).abs().max() > 0.01
    assert report["first_ratio"].item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("critic", ["reference", "lora", "own"])
def test_mixed_precision_keeps_log_probabilities_and_advantages_in_float32(tiny_model_dir, reward, critic):
    nets = ppo_helpers.networks(tiny_model_dir, reward, critic=critic)
    maker = ppo_helpers.maker(nets, tiny_model_dir, exact_kl=True)
    batch, objective = ppo_helpers.prompt_batch(tiny_model_dir), VarianceAware()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rollout = maker.make(batch, objective, all_sum=lambda x: x)
        inside = compute_advantages(rollout, 0.1, Gae(), lambda x: x)
    made = ("logprobs", "ref_logprobs", "entropy", "values", "token_kl", "reward", "kl_weight")
    numbers = {name: getattr(rollout, name) for name in made}
    numbers |= {name: getattr(inside, name) for name in ("advantages", "returns")}
    assert {name: x.dtype for name, x in numbers.items()} == dict.fromkeys(numbers, torch.float32)
    # The sums of GAE are not rounded either.
    outside = compute_advantages(rollout, 0.1, Gae(), lambda x: x)
    assert torch.equal(inside.advantages, outside.advantages)
    assert torch.equal(inside.returns, outside.returns)


@pytest.mark.parametrize(
    ("option", "value"),
    [("epochs", 0), ("minibatches", 0), ("micro_batch_tokens", 0), ("clip_range", 0.0), ("max_grad_norm", 0.0)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=rf"model.update.{option}: expected .*, got {value}"):
        UpdateSettings(**{option: value})
