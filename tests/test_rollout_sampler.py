"""Samplers with weights of their own: what rollouts and updates make of what they say."""

import math

import ppo_helpers
import pytest
import torch
from samplers import TruthfulGenerator
from vllm_stand_in import stand_in

from lit_vapo.advantages.gae import Gae
from lit_vapo.functional import TokenLogprobs
from lit_vapo.models.generation import Generator
from lit_vapo.models.transformers_generator import TransformersGenerator
from lit_vapo.models.vllm_generator import VllmGenerator
from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.stages.ppo.experience import compute_advantages
from lit_vapo.stages.ppo.update import PPOUpdate, UpdateSettings
from lit_vapo.types import RewardEstimate


class Silent(Generator):
    """Draws as usual, and says nothing of it."""

    def __call__(self, *args):
        return TransformersGenerator()(*args)._replace(own=None)


@pytest.fixture(scope="module")
def ensemble(tiny_model_dir, tmp_path_factory):
    return ppo_helpers.ensemble(tmp_path_factory.mktemp("sampler") / "ensemble", tiny_model_dir)


@pytest.fixture
def nets(tiny_model_dir, ensemble):
    return ppo_helpers.moved_networks(tiny_model_dir, ensemble)


def rollout_of(nets, model, generator, version=0, count=1):
    torch.manual_seed(0)
    maker = ppo_helpers.maker(nets, model, num_responses=count, generator=generator)
    return maker, maker.make(ppo_helpers.prompt_batch(model), MeanReward(), version=version)


def updated(nets, maker, rollout, cap=2.0, rows=None):
    """Gradient of the actor in the first step on a rollout."""
    experience = compute_advantages(rollout, 0.0, Gae(), lambda x: x, cap)
    settings = UpdateSettings(epochs=1, minibatches=1, max_grad_norm=1e9, value_coef=0.0)
    before = ppo_helpers.state(nets)
    torch.manual_seed(0)
    learned = PPOUpdate(ppo_helpers.LoneModule(), nets, settings, maker.shaping).run(
        experience, torch.optim.SGD(nets.actor_parameters(), lr=1.0)
    )
    moved = [(before[n] - p).flatten() for n, p in ppo_helpers.state(nets).items() if ".actor." in n]
    return torch.cat(moved), learned


def test_a_generator_of_the_old_kind_is_asked_as_before(nets, tiny_model_dir):
    _, plain = rollout_of(nets, tiny_model_dir, Silent())
    _, usual = rollout_of(nets, tiny_model_dir, None)
    assert torch.equal(plain.rows.input_ids, usual.rows.input_ids)
    assert plain.sampler is None
    assert plain.sampler_logprobs is None


def test_what_an_honest_sampler_says_changes_no_update(nets, tiny_model_dir):
    maker, rollout = rollout_of(nets, tiny_model_dir, TruthfulGenerator())
    assert float(rollout.sampler.kl) < 1e-9
    assert float(rollout.sampler.ratio_max) == pytest.approx(1.0, abs=1e-4)
    rollout.sampler_logprobs = rollout.logprobs.clone()
    start = {n: p.detach().clone() for n, p in nets.named_parameters()}
    weighted, told = updated(nets, maker, rollout)
    nets.load_state_dict(start, strict=False)
    rollout.sampler_logprobs = None
    plain, untold = updated(nets, maker, rollout)
    assert torch.equal(weighted, plain)
    assert torch.equal(told["policy_loss"], untold["policy_loss"])


def test_tokens_are_weighted_by_the_ratio_at_the_time_of_the_rollout(nets, tiny_model_dir):
    maker, rollout = rollout_of(nets, tiny_model_dir, TruthfulGenerator())
    # A sampler that says each token was a quarter less likely: every weight is 4/3, and so is every gradient.
    start = {n: p.detach().clone() for n, p in nets.named_parameters()}
    rollout.sampler_logprobs = None
    plain, _ = updated(nets, maker, rollout)
    nets.load_state_dict(start, strict=False)
    rollout.sampler_logprobs = rollout.logprobs + math.log(0.75)
    weighted, told = updated(nets, maker, rollout)
    torch.testing.assert_close(weighted, plain * 4 / 3, rtol=1e-4, atol=1e-6)
    # The ratio of PPO stays the learner's own.
    assert float(told["first_ratio"]) == pytest.approx(1.0, abs=1e-5)
    nets.load_state_dict(start, strict=False)
    capped, _ = updated(nets, maker, rollout, cap=1.0)
    torch.testing.assert_close(capped, plain, rtol=1e-4, atol=1e-7)
    nets.load_state_dict(start, strict=False)
    unweighted, _ = updated(nets, maker, rollout, cap=None)
    assert torch.equal(unweighted, plain)


def passes(nets, monkeypatch):
    """The policy's passes, as they are asked for."""
    asked, actor = [], nets.actor
    monkeypatch.setattr(nets, "actor", lambda *args: asked.append(1) or actor(*args))
    return asked


def test_the_policy_is_not_read_again_where_sampling_said_what_it_had(nets, tiny_model_dir, monkeypatch):
    asked = passes(nets, monkeypatch)
    maker, first = rollout_of(nets, tiny_model_dir, None)
    assert asked
    asked.clear()
    torch.manual_seed(0)
    again = maker.make(ppo_helpers.prompt_batch(tiny_model_dir), MeanReward())
    assert not asked
    assert torch.equal(again.logprobs, first.logprobs)
    maker.generator = Silent()
    torch.manual_seed(0)
    read = maker.make(ppo_helpers.prompt_batch(tiny_model_dir), MeanReward())
    assert asked
    torch.testing.assert_close(again.logprobs, read.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.entropy, read.entropy, atol=1e-5, rtol=1e-5)


def test_a_model_that_samples_otherwise_than_it_reads_is_read_again(nets, tiny_model_dir, monkeypatch):
    asked = passes(nets, monkeypatch)
    # It samples at three times the temperature, and thinks that it did not.
    maker, first = rollout_of(nets, tiny_model_dir, TruthfulGenerator(3.0))
    torch.manual_seed(0)
    again = maker.make(ppo_helpers.prompt_batch(tiny_model_dir), MeanReward())
    assert len(asked) == 2
    learner = nets.actor(again.rows, maker.shaping)
    for rollout in (first, again):
        torch.testing.assert_close(rollout.logprobs, learner.logprobs, atol=1e-5, rtol=1e-5)


def reference_rollout(nets, model, taught=True):
    """A maker that has seen what sampling finds, if it was taught, and a rollout of the reference's by it."""
    maker = ppo_helpers.maker(nets, model, generator=None if taught else Silent())
    torch.manual_seed(0)
    first = maker.make(ppo_helpers.prompt_batch(model), MeanReward(), "reference", values=False)
    torch.manual_seed(0)
    return maker, first, maker.make(ppo_helpers.prompt_batch(model), MeanReward(), "reference", values=False)


def test_the_reference_s_own_responses_are_read_no_deeper_than_rewards_do(tiny_model_dir, tmp_path, monkeypatch):
    shallow = ppo_helpers.ensemble(tmp_path / "ensemble", tiny_model_dir, layer=1, pooling="mean")
    nets = ppo_helpers.moved_networks(tiny_model_dir, shallow)
    asked, reference = [], nets.reference
    monkeypatch.setattr(nets, "reference", lambda *args, **options: asked.append(1) or reference(*args, **options))
    _, first, told = reference_rollout(nets, tiny_model_dir)
    # The first time a pass looked whether sampling finds the same.
    assert len(asked) == 1
    assert first.stopped.any()
    _, _, read = reference_rollout(nets, tiny_model_dir, taught=False)
    assert len(asked) == 3
    assert torch.equal(told.rows.input_ids, read.rows.input_ids)
    for name in ("logprobs", "ref_logprobs", "entropy", "reward"):
        torch.testing.assert_close(getattr(told, name), getattr(read, name), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(told.estimate.members, read.estimate.members, atol=1e-5, rtol=1e-5)
    assert torch.equal(told.logprobs, told.ref_logprobs)
    # Figures do not depend on whether somebody looked.
    for name in ("logprobs", "ref_logprobs", "entropy"):
        assert torch.equal(getattr(first, name), getattr(told, name))


def test_rewards_that_read_no_pass_have_none_made_for_them(nets, tiny_model_dir, monkeypatch):
    maker, _, _ = reference_rollout(nets, tiny_model_dir)
    monkeypatch.setattr(type(nets.scorer), "taps", [])
    ones = torch.ones(len(ppo_helpers.PROMPTS))
    monkeypatch.setattr(nets.scorer, "estimate", lambda responses: RewardEstimate(ones, ones, None))
    monkeypatch.setattr(nets.policy, "layers", lambda *_: pytest.fail("a pass nobody reads"))
    maker.make(ppo_helpers.prompt_batch(tiny_model_dir), MeanReward(), "reference", values=False)


def test_longer_references_than_any_before_are_read_whole(nets, tiny_model_dir):
    maker, _, _ = reference_rollout(nets, tiny_model_dir)
    rows = ppo_helpers.make_rollout(nets, tiny_model_dir, tokens=20).rows
    assert int(rows.lengths.max()) > maker._passes._held_up_to["reference"]
    wrong = TokenLogprobs(*torch.full((2, *rows.response_mask.shape), -1.0))
    found = maker._passes.score(rows, "reference", nets.scorer.taps, values=False, own=wrong)
    torch.testing.assert_close(found.logprobs, nets.reference(rows, maker.shaping).logprobs, atol=1e-5, rtol=1e-5)
    assert maker._passes._held_up_to["reference"] is None
    again = maker._passes.score(rows, "reference", nets.scorer.taps, values=False, own=wrong)
    assert torch.equal(again.logprobs, found.logprobs)


def test_longer_rows_than_any_before_are_read_again(nets, tiny_model_dir, monkeypatch):
    asked = passes(nets, monkeypatch)
    maker, _ = rollout_of(nets, tiny_model_dir, None)
    asked.clear()
    rows = ppo_helpers.make_rollout(nets, tiny_model_dir, tokens=20).rows
    assert int(rows.lengths.max()) > maker._passes._held_up_to["actor"]
    asked.clear()
    wrong = TokenLogprobs(*torch.full((2, *rows.response_mask.shape), -1.0))
    found = maker._passes._actor(rows, wrong)
    learner = nets.actor(rows, maker.shaping)
    assert torch.equal(found.logprobs, learner.logprobs)
    # From now on nothing that sampling says is taken.
    assert maker._passes._held_up_to["actor"] is None


def test_responses_of_other_weights_are_refused_with_both_versions(nets, tiny_model_dir):
    class Late(TruthfulGenerator):
        def sync(self, policy, role, version):
            super().sync(policy, role, version - 1)

    with pytest.raises(ValueError, match=r"of the weights of version 4 .*, got those of version 3"):
        rollout_of(nets, tiny_model_dir, Late(), version=4)


def test_a_sampler_that_is_too_far_off_ends_the_run(nets, tiny_model_dir):
    # It samples at another temperature than it should, and says so truthfully.
    generator = TruthfulGenerator(3.0)
    _, rollout = rollout_of(nets, tiny_model_dir, generator, count=20)
    assert float(rollout.sampler.kl) > 0.03
    generator.max_kl = 0.01
    with pytest.raises(ValueError, match=r"KL\(sampler‖learner\) is 0\.\d+ nats per token, above max_kl = 0.01"):
        rollout_of(nets, tiny_model_dir, generator)


def fit(model, ensemble, folder, generator, **kwargs):
    """Two iterations of PPO with steps that are seen in the log-probabilities."""
    options = {"learning_rate": 0.3, "generator": generator, **kwargs}
    module = ppo_helpers.ppo_module(model, ensemble, **options)
    return module, ppo_helpers.fit_ppo(
        module, ppo_helpers.prompt_data(model, folder), folder, max_epochs=1, limit_train_batches=3
    )


def test_a_run_has_new_adapters_in_each_iteration(tiny_model_dir, ensemble, tmp_path):
    with stand_in(tiny_model_dir) as server:
        generator = VllmGenerator(server.address, timeout_seconds=60.0)
        _, rows = fit(tiny_model_dir, ensemble, tmp_path, generator)
        # Four weight updates an iteration.
        assert [path.rpartition("/")[2] for path in server.loaded] == ["v0", "v4", "v8"]
        assert not server.adapters
    assert len(rows) == 3
    for row in rows:
        assert row["train/sampler_kl"] < 1e-6
        assert row["train/sampler_ratio_max"] == pytest.approx(1.0, abs=1e-2)
        assert row["train/first_ratio"] == pytest.approx(1.0, abs=1e-4)
    assert not list((tmp_path / "generator").glob("v*"))


def test_a_server_that_keeps_old_adapters_is_found_out(tiny_model_dir, ensemble, tmp_path):
    message = r"iteration 2: model.generator: expected responses of the policy as it is now, .* above max_kl = 0.01"
    with stand_in(tiny_model_dir, keeps_old=True) as server:
        generator = VllmGenerator(server.address, timeout_seconds=60.0, max_kl=0.01)
        with pytest.raises(ValueError, match=message):
            fit(tiny_model_dir, ensemble, tmp_path, generator)
    assert len(server.loaded) == 2


def test_a_server_that_dies_in_a_run_ends_it_with_a_reason(tiny_model_dir, ensemble, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_vapo.models.vllm_generator.RECOVERY", 0.1)
    with stand_in(tiny_model_dir) as server:
        answer = server.answer

        def dying(path, body):
            server.dead = server.dead or len(server.loaded) == 2
            return None if server.dead else answer(path, body)

        server.answer = dying
        with pytest.raises(
            ValueError, match=r"iteration 2: model.generator: expected an answer, got none: http.*--resume"
        ):
            fit(tiny_model_dir, ensemble, tmp_path, VllmGenerator(server.address, timeout_seconds=5.0))
