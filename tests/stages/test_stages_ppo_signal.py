"""How much of an update is signal: halves of the first minibatch."""

import ppo_helpers
import pytest
import torch
from ppo_helpers import LoneModule

import lit_vapo.stages.ppo.signal as module_under_test
from lit_vapo.models.generation import Shaping
from lit_vapo.stages.ppo.signal import SignalProbe, halves_by_prompt
from lit_vapo.stages.ppo.update import PPOUpdate, UpdateSettings


@pytest.fixture(scope="module")
def reward(tiny_model_dir, tmp_path_factory):
    return ppo_helpers.ensemble(tmp_path_factory.mktemp("signal") / "ensemble", tiny_model_dir)


def test_a_prompt_is_in_one_half():
    # Rows 5, 0, 4, 2, 3 answer prompts 2, 0, 2, 1, 1: the first and third of these prompts, and the second.
    first, second = halves_by_prompt(torch.tensor([5, 0, 4, 2, 3]), 2)
    assert first.tolist() == [0, 1, 2]
    assert second.tolist() == [3, 4]
    first, second = halves_by_prompt(torch.tensor([9, 1, 4, 7]), 1)
    assert (first.tolist(), second.tolist()) == ([1, 3], [0, 2])
    assert halves_by_prompt(torch.tensor([4, 5]), 2) is None


@pytest.mark.parametrize("tokens", [4096, 12])
def test_halves_are_those_of_two_updates_of_half_the_rows(tiny_model_dir, reward, tokens):
    nets = ppo_helpers.networks(tiny_model_dir, reward)
    experience = ppo_helpers.make_experience(nets, tiny_model_dir)
    settings = UpdateSettings(1, 1, micro_batch_tokens=tokens, max_grad_norm=1e9)

    def gradient(rows):
        """Gradient summed over the tokens of some rows; a step of size 0."""
        part = experience.select(rows)
        PPOUpdate(LoneModule(), nets, settings, Shaping()).run(part, torch.optim.SGD(nets.parameters(), lr=0.0))
        flat = torch.cat([p.grad.flatten() for p in nets.actor_parameters()])
        return flat * part.rows.response_mask.sum()

    one, two = gradient(torch.tensor([0, 2, 4])), gradient(torch.tensor([1, 3, 5]))
    updater = PPOUpdate(LoneModule(), nets, settings, Shaping())
    found = updater.run(experience, torch.optim.SGD(nets.parameters(), lr=0.0))
    cosine = torch.cosine_similarity(one, two, dim=0)
    torch.testing.assert_close(found["actor_grad_cosine"], cosine, atol=1e-4, rtol=1e-3)
    share = 4 * (one @ two) / (one + two).square().sum()
    torch.testing.assert_close(found["actor_grad_signal"].float(), share, atol=1e-4, rtol=1e-3)


def test_equal_halves_are_all_signal(tiny_model_dir, reward):
    nets = ppo_helpers.networks(tiny_model_dir, reward)
    experience = ppo_helpers.make_experience(nets, tiny_model_dir).select(torch.tensor([0, 0, 1, 1, 2, 2]))
    updater = PPOUpdate(LoneModule(), nets, UpdateSettings(1, 1), Shaping())
    found = updater.run(experience, ppo_helpers.optimizer(nets))
    assert found["actor_grad_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert found["actor_grad_signal"] == pytest.approx(1.0, abs=1e-5)


def test_it_is_left_out_where_it_cannot_be_known(tiny_model_dir, reward):
    nets = ppo_helpers.networks(tiny_model_dir, reward)
    experience = ppo_helpers.make_experience(nets, tiny_model_dir)
    for options in ({"train_actor": False}, {"num_responses": 6}):
        updater = PPOUpdate(LoneModule(), nets, UpdateSettings(1, 1), Shaping())
        assert "actor_grad_cosine" not in updater.run(experience, ppo_helpers.optimizer(nets), **options)


def test_it_changes_no_random_number_and_no_result(tiny_model_dir, reward, monkeypatch):
    ends = []
    for probed in (True, False):
        nets = ppo_helpers.networks(tiny_model_dir, reward)
        experience = ppo_helpers.make_experience(nets, tiny_model_dir)
        updater = PPOUpdate(LoneModule(), nets, UpdateSettings(2, 2), Shaping())
        if not probed:
            monkeypatch.setattr(updater, "_probe", lambda *_: None)
        torch.manual_seed(3)
        updater.run(experience, ppo_helpers.optimizer(nets, 1e-3))
        ends.append((ppo_helpers.state(nets), torch.rand(1)))
    assert torch.equal(ends[0][1], ends[1][1])
    for name, value in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], value, atol=1e-5, rtol=0)


def test_of_a_large_gradient_it_keeps_some_entries_of_every_weight(monkeypatch):
    monkeypatch.setattr(module_under_test, "MOST_ENTRIES", 100)
    weights = [torch.nn.Parameter(torch.zeros(*shape)) for shape in ((30, 30), (7,), (1, 90))]
    probe = SignalProbe(weights, halves_by_prompt(torch.arange(4), 1), lambda x: x, 1)
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    probe.look()
    # A step of 10 would see three columns of thirty; the next that shares no factor with 30 is 11.
    assert len(probe._first) == -(-900 // 11) + 1 + -(-90 // 11)
    assert len({i * 11 % 30 for i in range(82)}) == 30
    for weight in weights:
        weight.grad = 2 * weight.grad
    assert probe.statistics()["actor_grad_cosine"] == pytest.approx(1.0, abs=1e-5)
