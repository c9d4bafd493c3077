"""The penalty by the exact KL of each token's distribution, from the rollout to a run."""

import ppo_helpers
import pytest
import torch

from lit_vapo.advantages.gae import Gae
from lit_vapo.advantages.grpo import Grpo
from lit_vapo.metrics import rollout_statistics
from lit_vapo.models.generation import Sampling, Shaping
from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.rollout import RolloutMaker
from lit_vapo.stages.ppo.control import KLControl


@pytest.fixture(scope="module")
def reward(tiny_model_dir, tmp_path_factory):
    return ppo_helpers.ensemble(tmp_path_factory.mktemp("exact") / "ensemble", tiny_model_dir)


def moved(model, reward, lora=True):
    """Networks whose policy has left its reference."""
    if lora:
        return ppo_helpers.moved_networks(model, reward)
    nets = ppo_helpers.networks(model, reward, lora=False)
    generator = torch.Generator().manual_seed(1)
    for parameter in nets.policy.actor_parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return nets


def rolled(nets, model, exact=True, seed=0, sampling=None, prompts=None, **kwargs):
    """A rollout as training makes it."""
    torch.manual_seed(seed)
    maker = ppo_helpers.maker(nets, model, exact_kl=exact, **kwargs)
    if sampling is not None:
        maker = RolloutMaker(nets, nets.scorer, maker.tokenizer, sampling, exact_kl=exact, **kwargs)
    return maker, maker.make(ppo_helpers.prompt_batch(model, prompts), MeanReward(), all_sum=lambda x: x)


def log_probabilities(lm, rows, row, sampling, stops):
    """Log-probabilities (T, V) of the distribution that each token of a response was drawn from, from all logits."""
    start, end = int(rows.prompt_lengths[row]), int(rows.lengths[row])
    logits = lm(rows.input_ids[row : row + 1, :end]).logits[0, start - 1 : end - 1] / sampling.temperature
    logits[: sampling.min_new_tokens, list(stops)] = -1e9
    return logits.log_softmax(-1)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("sampling", [Sampling(6), Sampling(6, temperature=0.7, min_new_tokens=2)])
def test_a_rollout_s_kls_are_those_of_the_whole_logits(tiny_model_dir, reward, lora, sampling):
    nets = moved(tiny_model_dir, reward, lora)
    maker, rollout = rolled(nets, tiny_model_dir, sampling=sampling, tokens_per_batch=40)
    rows, expected = rollout.rows, torch.zeros(rollout.response_mask.shape)
    with torch.no_grad():
        for i, mask in enumerate(rollout.response_mask):
            both = []
            for role in ("actor", "reference"):
                with nets.policy.acting_as(role) as lm:
                    both.append(log_probabilities(lm, rows, i, sampling, maker.stops))
            expected[i, mask] = (both[0].exp() * (both[0] - both[1])).sum(-1)
    assert expected.max() > 0.01
    torch.testing.assert_close(rollout.token_kl, expected, atol=2e-5, rtol=1e-4)
    assert rollout.token_kl.dtype == torch.float32


def test_asking_for_exact_kls_changes_nothing_else(tiny_model_dir, reward):
    nets = moved(tiny_model_dir, reward)
    (_, with_them), (_, without) = (rolled(nets, tiny_model_dir, exact, num_responses=2) for exact in (True, False))
    assert without.token_kl is None
    assert "kl_exact" not in rollout_statistics(without)
    for name in ("ref_logprobs", "values", "value_states", "reward"):
        assert torch.equal(getattr(with_them, name), getattr(without, name)), name
    # Exact KLs need a pass of the policy; without them sampling tells these, rounded otherwise.
    for name in ("logprobs", "entropy"):
        torch.testing.assert_close(getattr(with_them, name), getattr(without, name), atol=2e-5, rtol=1e-5)


def test_only_training_asks_for_them(tiny_model_dir, reward):
    nets = moved(tiny_model_dir, reward)
    maker = ppo_helpers.maker(nets, tiny_model_dir, exact_kl=True)
    for role in ("actor", "reference"):
        assert maker.make(ppo_helpers.prompt_batch(tiny_model_dir), MeanReward(), role).token_kl is None


def test_they_say_what_sampled_log_ratios_say_on_average(tiny_model_dir, reward):
    # 600 responses: exact KLs scatter less about the same mean.
    nets = moved(tiny_model_dir, reward)
    _, rollout = rolled(nets, tiny_model_dir, num_responses=100)
    found = rollout_statistics(rollout)
    exact = rollout.token_kl.sum(1)
    torch.testing.assert_close(found["kl_exact"], exact.mean())
    difference = exact - rollout.log_ratio
    assert difference.mean().abs() < 3 * difference.std() / 600**0.5
    assert exact.std() < 0.6 * rollout.log_ratio.std()


def test_a_policy_at_its_reference_has_no_kl(tiny_model_dir, reward):
    _, rollout = rolled(ppo_helpers.networks(tiny_model_dir, reward), tiny_model_dir)
    assert rollout.token_kl.abs().max() < 1e-6


@pytest.mark.parametrize(("advantage", "critic"), [(Gae, "reference"), (Grpo, None)])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_learns_by_it(tiny_model_dir, reward, tmp_path, advantage, critic, precision):
    module = ppo_helpers.ppo_module(
        tiny_model_dir, reward, kl_estimator="exact", advantage=advantage(), sampling=Sampling(6, num_responses=2)
    )
    data = ppo_helpers.prompt_data(tiny_model_dir, tmp_path)
    logged = ppo_helpers.fit_ppo(module, data, tmp_path, precision=precision, limit_train_batches=2)
    assert [row["train/kl_exact"] >= -1e-6 for row in logged] == [True, True]
    assert logged[1]["train/kl_exact"] > 1e-3
    assert logged[1]["train/kl_exact"] == pytest.approx(logged[1]["train/kl_k3"], rel=1.0)


def test_sampled_log_ratios_are_the_default(tiny_model_dir, reward):
    assert not ppo_helpers.ppo_module(tiny_model_dir, reward).kl.exact


def test_another_estimator_is_refused():
    with pytest.raises(ValueError, match=r"model.kl_estimator: expected one of \('sampled', 'exact'\), got 'k3'"):
        KLControl(0.1, estimator="k3")


def test_shaping_is_the_rollout_s(tiny_model_dir, reward):
    # A policy twice as hot is nearer to its reference.
    nets = moved(tiny_model_dir, reward)
    _, rollout = rolled(nets, tiny_model_dir)
    with torch.no_grad():
        cold, hot = (
            nets.actor_with_kl(rollout.rows, shaping, nets.reference(rollout.rows, shaping, keep_states=True).states)[1]
            for shaping in (Shaping(1.0), Shaping(2.0))
        )
    torch.testing.assert_close(cold, rollout.token_kl)
    assert hot.sum() < 0.5 * cold.sum()
