"""Advantages that see what the source of rewards said: by hand, in their limits, and what they refuse."""

import math

import ppo_helpers
import pytest
import torch

from lit_vapo.advantages.gdpo import Gdpo
from lit_vapo.advantages.grpo import Grpo
from lit_vapo.advantages.rvpo import Rvpo
from lit_vapo.advantages.signal_to_noise import SignalToNoise
from lit_vapo.functional import ensemble_estimate, group_centre, group_normalise, group_scale, group_shrink
from lit_vapo.models.generation import Sampling
from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.rewards import FunctionReward, WeightedSum
from lit_vapo.types import RewardEstimate

N = 4
MASK = torch.ones(8, 1, dtype=torch.bool)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alone(x):
    return x


def judged(advantage, rewards, said, num_responses=N, all_sum=alone):
    """Advantages of responses of one token."""
    mask = torch.ones(len(rewards), 1, dtype=torch.bool)
    return advantage(rewards[:, None], None, mask, num_responses, all_sum, said).advantages[:, 0]


def summed(weights, **columns):
    """The estimate of a sum of named rewards without variance."""
    parts = {name: RewardEstimate(x, torch.zeros_like(x), None) for name, x in columns.items()}
    mean = sum(weights[name] * x for name, x in columns.items())
    return RewardEstimate(mean, torch.zeros_like(mean), mean[:, None], parts=parts, weights=weights)


# 1. The maths of a group.


def test_centre_and_scale_by_hand():
    # (1, 2, 6): mean 3, deviations -2, -1, 3, variance 14/2.
    torch.testing.assert_close(group_centre(torch.tensor([1.0, 2.0, 6.0]), 3), torch.tensor([-2.0, -1.0, 3.0]))
    scale = group_scale(torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 0.0]), 3, eps=0.5)
    torch.testing.assert_close(scale, torch.tensor([7**0.5 + 0.5] * 3 + [0.5] * 3))
    both = group_centre(draw(8), N) / group_scale(draw(8), N, 0.1)
    torch.testing.assert_close(both, group_normalise(draw(8), N, 0.1))


def test_shrinking_by_hand():
    # Rewards 0, 0, 6 with noise 0, 3, 9: variance 12, mean noise 4, signal S = 8; w = 1, 8/11, 8/17.
    # m = 6·(8/17)/(1 + 8/11 + 8/17), and what is left is w·(R - m).
    w = torch.tensor([1, 8 / 11, 8 / 17])
    m = 6 * (8 / 17) / (1 + 8 / 11 + 8 / 17)
    expected = w * (torch.tensor([0.0, 0.0, 6.0]) - m)
    found = group_shrink(torch.tensor([0.0, 0.0, 6.0]), torch.tensor([0.0, 3.0, 9.0]), 3)
    torch.testing.assert_close(found, expected)
    assert abs(found.sum().item()) < 1e-6


def test_shrinking_guesses_better_than_not_and_never_less_than_the_right_amount():
    # True differences N(0, 1), noise of two sizes that is known: the squared error of the guess beside that of R.
    truth, size = draw(4000, 8).double(), torch.tensor([0.5, 2.0]).repeat(4).double()
    observed = truth + size * draw(4000, 8, seed=1).double()
    noise = size.square().expand(4000, 8)
    guess = group_shrink(observed.flatten(), noise.flatten(), 8).view(4000, 8)

    def error(x):
        centred = (x - x.mean(1, keepdim=True)) - (truth - truth.mean(1, keepdim=True))
        return centred.square().mean().item()

    # Best with S known: each s_i has posterior variance S·v/(S + v) = 0.2 and 0.8.
    assert error(guess) < 0.85 < error(observed) / 2
    assert error(guess) > 0.4


def test_limits_of_shrinking():
    rewards = draw(8)
    torch.testing.assert_close(group_shrink(rewards, torch.zeros(8), N), group_centre(rewards, N))
    assert group_shrink(rewards, torch.full((8,), 100.0), N).abs().max() == 0
    assert group_shrink(torch.ones(8), torch.zeros(8), N).abs().max() == 0


# 2. Signal to noise.


def test_signal_to_noise_by_hand():
    # R̂ = 0, 0, 6 and σ² = 0, 3, 9 as above; R has 1 taken off the last: rest 0, 0, -1, centred 1/3, 1/3, -2/3.
    mean, rewards = torch.tensor([0.0, 0.0, 6.0]), torch.tensor([0.0, 0.0, 5.0])
    said = RewardEstimate(mean, torch.tensor([0.0, 3.0, 9.0]), None)
    rest = torch.tensor([1 / 3, 1 / 3, -2 / 3])
    expected = (group_shrink(mean, said.variance, 3) + rest) / ((25 / 3) ** 0.5 + 1e-4)
    torch.testing.assert_close(judged(SignalToNoise(), rewards, said, 3), expected)
    # ν = 1/3 takes a third of σ² for noise.
    third = (group_shrink(mean, said.variance / 3, 3) + rest) / ((25 / 3) ** 0.5 + 1e-4)
    torch.testing.assert_close(judged(SignalToNoise(1 / 3), rewards, said, 3), third)


def test_without_noise_it_is_grpo():
    said = ensemble_estimate(draw(8, 5))
    rewards = said.mean - 0.3 * draw(8, seed=1)
    grpo = judged(Grpo(), rewards, None)
    torch.testing.assert_close(judged(SignalToNoise(noise=0.0), rewards, said), grpo)
    torch.testing.assert_close(judged(SignalToNoise(), rewards, said._replace(variance=torch.zeros(8))), grpo)


def test_a_disputed_response_counts_for_less_and_its_penalty_does_not():
    mean = torch.tensor([3.0, 3.0, -3.0, -3.0])
    said = RewardEstimate(mean, torch.tensor([0.1, 4.0, 0.1, 0.1]), None)
    sure, disputed, *_ = judged(SignalToNoise(), mean, said)
    assert 0 < disputed < 0.9 * sure
    # A nat costs the same wherever members stand.
    mean, nat = torch.tensor([3.0, 0.0, -3.0, 0.0]), torch.tensor([0.0, 0.1, 0.0, 0.0])
    said = said._replace(mean=mean)
    cost = (judged(SignalToNoise(), mean, said) - judged(SignalToNoise(), mean - nat, said))[1]
    plain = (judged(Grpo(), mean, None) - judged(Grpo(), mean - nat, None))[1]
    assert cost.item() == pytest.approx(plain.item(), rel=0.01)


def test_a_prompt_of_noise_teaches_nothing_but_the_penalty():
    said = RewardEstimate(draw(4), torch.full((4,), 50.0), None)
    assert judged(SignalToNoise(), said.mean, said).abs().max() == 0
    penalty = torch.tensor([0.0, 0.0, 0.0, 1.0])
    found = judged(SignalToNoise(), said.mean - penalty, said)
    assert found[3] < 0 < found[0]


# 3. A soft minimum.


def test_rvpo_by_hand():
    # Two members, two responses: (0, 2) and (2, 2.2). Each in standard deviations, ε → 0: z = ∓1/√2 for both members.
    # With the second member turned round, z = (∓, ±)/√2: soft minima are equal, and nothing is left.
    z = 2**-0.5
    members = torch.tensor([[0.0, 2.0], [2.0, 2.2]])
    rewards = members.mean(1)
    found = judged(Rvpo(eps=1e-8), rewards, ensemble_estimate(members), 2)
    torch.testing.assert_close(found, torch.tensor([-z, z]), rtol=1e-4, atol=1e-5)
    members = torch.tensor([[0.0, 2.2], [2.0, 2.0]])
    found = judged(Rvpo(eps=1e-8), rewards, ensemble_estimate(members)._replace(mean=rewards), 2)
    torch.testing.assert_close(found, torch.zeros(2), rtol=0, atol=1e-5)


def test_rvpo_of_weighted_rewards_by_hand():
    # Three responses; "a" is 0, 1, 2 → z = -1, 0, 1; "b" 0, 4, 2 of weight -3 → turned round 1, -1, 0; ω = 1/4, 3/4.
    said = summed({"a": 1.0, "b": -3.0}, a=torch.tensor([0.0, 1.0, 2.0]), b=torch.tensor([0.0, 4.0, 2.0]))
    e = math.exp
    least = [-math.log(e(1) / 4 + 3 * e(-1) / 4), -math.log(1 / 4 + 3 * e(1) / 4), -math.log(e(-1) / 4 + 3 / 4)]
    expected = torch.tensor(least) - sum(least) / 3
    found = judged(Rvpo("rewards", eps=1e-9), said.mean, said, 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sharpness", [1e-6, 1e6])
def test_limits_of_rvpo_are_the_mean_and_the_least(sharpness):
    said = ensemble_estimate(draw(8, 5))
    z = torch.stack([group_normalise(column, N) for column in said.members.T], 1)
    expected = z.mean(1) if sharpness < 1 else z.amin(1)
    found = judged(Rvpo(sharpness=sharpness), said.mean, said)
    torch.testing.assert_close(found, group_centre(expected, N), rtol=1e-3, atol=1e-4)


def test_rvpo_of_equal_members_is_grpo():
    said = ensemble_estimate(draw(8)[:, None].expand(-1, 3))
    rewards = said.mean - 0.5 * draw(8, seed=1)
    for sharpness in (0.1, 10.0):
        found = judged(Rvpo(sharpness=sharpness), rewards, said)
        torch.testing.assert_close(found, judged(Grpo(), rewards, None), rtol=1e-4, atol=1e-5)


def test_a_penalty_is_part_of_what_each_member_gives():
    said, penalty = ensemble_estimate(draw(8, 3)), draw(8, seed=1).abs()
    charged = ensemble_estimate(said.members - penalty[:, None])
    torch.testing.assert_close(judged(Rvpo(), said.mean - penalty, said), judged(Rvpo(), charged.mean, charged))


# 4. Each reward by itself.


def test_gdpo_by_hand():
    # z of "a" is -1, 0, 1 and of "b" -1, 1, 0, times its weight -2: sums 1, -2, 1, mean 0, variance (1 + 4 + 1)/2 = 3.
    said = summed({"a": 1.0, "b": -2.0}, a=torch.tensor([0.0, 1.0, 2.0]), b=torch.tensor([0.0, 40.0, 20.0]))
    found = judged(Gdpo(eps=1e-9), said.mean, said, 3)
    torch.testing.assert_close(found, torch.tensor([1.0, -2.0, 1.0]) / 3**0.5, rtol=1e-4, atol=1e-5)


def test_gdpo_of_one_reward_is_grpo_whitened():
    reward = draw(8)
    found = judged(Gdpo(), 0.5 * reward, summed({"one": 0.5}, one=reward))
    grpo = judged(Grpo(), reward, None)
    torch.testing.assert_close(found, (grpo - grpo.mean()) / grpo.std(), rtol=1e-3, atol=1e-4)


def test_gdpo_hears_a_reward_whatever_its_unit_and_tells_equal_sums_apart():
    # (0, 1), (1, 0), (0, 0), (0, 0): the first two have the same sum. One is rare in its prompt, the other common.
    one, other = torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    said = summed({"one": 1.0, "other": 1.0}, one=one, other=other)
    assert len(judged(Grpo(), said.mean, None).unique()) == 2
    found = judged(Gdpo(), said.mean, said)
    assert found[1] > found[0]
    louder = summed({"one": 1.0, "other": 1.0}, one=one, other=1000 * other)
    torch.testing.assert_close(judged(Gdpo(eps=1e-9), louder.mean, louder), found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("advantage", [Gdpo(), Rvpo("rewards")])
def test_a_reward_of_weight_zero_is_not_seen(advantage):
    columns = {"one": draw(8), "other": draw(8, seed=1)}
    said = summed({"one": 1.0, "other": 2.0}, **columns)
    logged = summed({"one": 1.0, "other": 2.0, "third": 0.0}, third=draw(8, seed=2), **columns)
    torch.testing.assert_close(judged(advantage, said.mean, said), judged(advantage, said.mean, logged))


@pytest.mark.parametrize("advantage", [Gdpo(), Rvpo("rewards")])
def test_the_penalty_takes_part_in_the_spread_of_the_reward(advantage):
    said = summed({"one": 1.0}, one=torch.zeros(8))
    penalty = torch.tensor([0.0, 0.0, 0.0, 0.01] * 2)
    found = judged(advantage, said.mean - penalty, said)
    # A prompt whose rewards are all equal: the penalty alone, in its own standard deviations and no more.
    torch.testing.assert_close(found / found[0], judged(Grpo(), -penalty, None) / judged(Grpo(), -penalty, None)[0])
    assert found.abs().max() < 3


# 5. What they refuse, and a run.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SignalToNoise().check_rewards(1), "SignalToNoise needs the variance .* at least 2 members, got 1"),
        (
            lambda: Rvpo().check_rewards(1),
            "Rvpo over members: expected a source with at least 2 separate members, got 1",
        ),
        (lambda: Rvpo().check_rewards(4, False), "at least 2 separate members, got one without. A sum has them"),
        (lambda: Rvpo("rewards").check_rewards(4), "Rvpo compares named rewards: expected a WeightedSum"),
        (lambda: Gdpo().check_rewards(4), "Gdpo compares named rewards: expected a WeightedSum as model.reward"),
        (lambda: Rvpo(sharpness=0.0), "model.advantage.sharpness: expected a number above 0, got 0.0"),
        (lambda: SignalToNoise(-1.0), "model.advantage.noise: expected a number of 0 or more, got -1.0"),
        (lambda: Gdpo(0.0), "model.advantage.eps: expected a number above 0, got 0.0"),
        (
            lambda: judged(Gdpo(), draw(8), ensemble_estimate(draw(8, 2))),
            "Gdpo: expected an estimate with named rewards, got one without",
        ),
        (
            lambda: judged(Rvpo(), draw(8), RewardEstimate(draw(8), torch.ones(8), None)),
            "Rvpo: expected an estimate with separate members, got one without",
        ),
        (lambda: group_scale(draw(8), N, 0.0), "expected eps > 0, got 0.0"),
        (lambda: group_shrink(draw(8), draw(4), N), r"expected noise of shape \(8,\), as rewards, got \(4,\)"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture(scope="module")
def ensemble(tiny_model_dir, tmp_path_factory):
    return ppo_helpers.ensemble(tmp_path_factory.mktemp("reward"), tiny_model_dir)


def weighted(ensemble):
    return WeightedSum(
        {"ensemble": ensemble, "length": FunctionReward("reward_functions:length")}, weights={"length": -0.1}
    )


# Random heads disagree more than these responses differ: all of σ² would leave nothing to learn from.
@pytest.mark.parametrize("advantage", [SignalToNoise(noise=0.01), Rvpo(), Rvpo("rewards"), Gdpo()])
def test_a_run_learns_with_it(tiny_model_dir, ensemble, tmp_path, advantage):
    options = {"advantage": advantage, "objective": MeanReward(), "sampling": Sampling(6, num_responses=3)}
    module = ppo_helpers.ppo_module(tiny_model_dir, weighted(ensemble), **options)
    data = ppo_helpers.prompt_data(tiny_model_dir, tmp_path)
    rows = ppo_helpers.fit_ppo(module, data, tmp_path, limit_train_batches=2)
    assert [row["train/updates"] for row in rows] == [4, 4]
    assert any(p.abs().max() > 0 for n, p in module.named_parameters() if "lora_B" in n and p.requires_grad)


def test_a_run_refuses_a_source_that_does_not_fit_before_anything_is_loaded(tiny_model_dir, ensemble):
    options = {"advantage": Gdpo(), "sampling": Sampling(6, num_responses=3)}
    with pytest.raises(ValueError, match="model.advantage: Gdpo compares named rewards"):
        ppo_helpers.ppo_module(tiny_model_dir, ensemble, **options)


def test_a_sum_says_what_its_rewards_are_called_and_count(ensemble):
    weights = {"length": -0.1, "logged": 0.0}
    length = {name: FunctionReward("reward_functions:length") for name in ("length", "logged")}
    assert WeightedSum({"ensemble": ensemble, **length}, weights).named == ("ensemble", "length")
    assert FunctionReward("reward_functions:length").named == ()
