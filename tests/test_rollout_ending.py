"""PPO warns where an ensemble rewards that a text ends, rather than what it says."""

import warnings

import ppo_helpers
import pytest
import torch

from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.rollout.ending import ENOUGH, EndingWatch


def rewards(gap, count=40):
    """Rewards of unit spread within both kinds, finished ones higher by `gap`."""
    generator = torch.Generator().manual_seed(0)
    stopped = torch.arange(count) % 2 == 0
    return torch.randn(count, generator=generator) + gap * stopped, stopped


@pytest.mark.parametrize(("gap", "learned"), [(4.0, "end"), (-4.0, "go on")])
def test_an_ending_that_counts_more_than_content_is_told_once(gap, learned):
    watch = EndingWatch()
    with pytest.warns(UserWarning, match=rf"PPO will learn to {learned} first .*missing_eos_penalty"):
        watch.look(*rewards(gap))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.look(*rewards(gap))


def test_content_that_counts_more_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EndingWatch().look(*rewards(0.3))


def test_responses_are_collected_until_there_are_enough_of_both_kinds():
    watch, (values, stopped) = EndingWatch(), rewards(4.0, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.look(torch.randn(50), torch.zeros(50, dtype=torch.bool))
        for _ in range(ENOUGH // 2 - 1):
            watch.look(values, stopped)
    with pytest.warns(UserWarning, match="finished responses are rewarded"):
        watch.look(values, stopped)


def test_rollouts_of_training_are_watched_and_others_not(tiny_model_dir, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(EndingWatch, "look", lambda self, *a: seen.append(a))
    reward = ppo_helpers.ensemble(tmp_path / "e", tiny_model_dir)
    networks = ppo_helpers.networks(tiny_model_dir, reward)
    maker, batch = ppo_helpers.maker(networks, tiny_model_dir), ppo_helpers.prompt_batch(tiny_model_dir)
    maker.make(batch, MeanReward())
    assert seen == []
    rollout = maker.make(batch, MeanReward(), all_sum=lambda x: x)
    ((values, stopped),) = seen
    assert torch.equal(values, rollout.estimate.mean)
    assert torch.equal(stopped, rollout.stopped)
