"""PrecisionWeighted: the optimum of VarianceAware, and another way there."""

import pytest
import torch

from lit_vapo.functional import reward_origin
from lit_vapo.objectives.precision_weighted import PrecisionWeighted
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.types import RewardEstimate

BETA = 0.7


def estimated(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(count, generator=generator, dtype=torch.float64)
    variance = 0.2 + 3 * torch.rand(count, generator=generator, dtype=torch.float64)
    return RewardEstimate(mean, variance, None, torch.tensor(1.0, dtype=torch.float64))


def optimum(reference, reward, weight):
    """π0·exp((R − c)/(β·w)) with the c that makes it sum to one, found by halving, and that c."""
    low, high = reward.min() - 50, reward.max() + 50
    for _ in range(200):
        c = (low + high) / 2
        total = (reference * ((reward - c) / (BETA * weight)).exp()).sum()
        low, high = (c, high) if total > 1 else (low, c)
    return reference * ((reward - c) / (BETA * weight)).exp(), c


def told(objective, coef=BETA):
    objective.price(torch.tensor(coef, dtype=torch.float64))
    return objective


def reinforced(policy, reference, reward, weight, kl_coef):
    """Gradient of E[R − β·w·ℓ] at softmax logits, as PPO takes it: ℓ is part of the reward, all responses counted."""
    returns = reward - kl_coef * weight * (policy / reference).log()
    return policy * (returns - (policy * returns).sum())


def test_origin_by_hand():
    # Precisions 1, ½, 1 and rewards over w 1, 2, 7: 9/1.5, 8/2, 3/1.5. With ℓ = 2 for the last and β = ½, 7 is 6.
    rewards, weight = torch.tensor([1.0, 4.0, 7.0]), torch.tensor([1.0, 2.0, 1.0])
    torch.testing.assert_close(reward_origin(rewards, weight, torch.zeros(3), 0.5, 3), torch.tensor([6.0, 4.0, 2.0]))
    found = reward_origin(rewards, weight, torch.tensor([0.0, 0.0, 2.0]), 0.5, 3)
    torch.testing.assert_close(found, torch.tensor([8 / 1.5, 7 / 2, 2.0]))


def test_each_prompt_has_its_own_origin_and_single_responses_share_one():
    rewards, weight = torch.tensor([1.0, 3.0, 10.0, 30.0]), torch.ones(4)
    torch.testing.assert_close(
        reward_origin(rewards, weight, torch.zeros(4), 0.1, 2), torch.tensor([3.0, 1.0, 30.0, 10.0])
    )
    torch.testing.assert_close(
        reward_origin(rewards, weight, torch.zeros(4), 0.1, 1), torch.tensor([43 / 3, 41 / 3, 34 / 3, 14 / 3])
    )
    # Two processes with the same responses.
    twice = reward_origin(rewards, weight, torch.zeros(4), 0.1, 1, lambda x: 2 * x)
    torch.testing.assert_close(twice, (88 - rewards) / 7)
    assert reward_origin(torch.tensor([5.0]), torch.tensor([0.3]), torch.zeros(1), 0.1, 1).tolist() == [0.0]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="expected a multiple of num_responses = 2 rewards, got 3"):
        reward_origin(torch.zeros(3), torch.ones(3), torch.zeros(3), 0.1, 2)
    with pytest.raises(ValueError, match="shape"):
        reward_origin(torch.zeros(3), torch.ones(2), torch.zeros(3), 0.1, 3)
    with pytest.raises(ValueError, match="expected min_weight > 0"):
        PrecisionWeighted(min_weight=0.0)


def test_at_the_optimum_the_origin_is_what_normalises_it_whatever_is_drawn():
    estimate = estimated()
    reward, weight = VarianceAware()(estimate)
    reference = torch.tensor([0.3, 0.2, 0.2, 0.1, 0.1, 0.1], dtype=torch.float64)
    policy, c = optimum(reference, reward, weight)
    drawn = torch.tensor([0, 3, 3, 5, 1, 4])
    found = reward_origin(reward[drawn], weight[drawn], (policy / reference).log()[drawn], BETA, 6)
    torch.testing.assert_close(found, c.expand(6), rtol=1e-9, atol=1e-9)


def test_both_objectives_are_at_rest_at_the_same_policy():
    estimate = estimated()
    reward, weight = VarianceAware()(estimate)
    reference = torch.full((6,), 1 / 6, dtype=torch.float64)
    policy, _ = optimum(reference, reward, weight)
    assert float((policy / reference).log().abs().max()) > 0.5
    score = told(PrecisionWeighted()).observe(estimate, (policy / reference).log(), 6, lambda x: x)
    assert score.kl_weight.tolist() == [1.0] * 6
    for given in ((score.reward, score.kl_weight), (reward, weight)):
        still = reinforced(policy, reference, *given, BETA)
        torch.testing.assert_close(still, torch.zeros_like(still), atol=1e-9, rtol=0)
    # The reward of plain RLHF is not at rest there.
    assert float(reinforced(policy, reference, reward, torch.ones_like(weight), BETA).abs().max()) > 0.01


def test_the_weight_acts_from_the_first_step():
    # At the reference, where any KL has no gradient: response 0 is well known, the others are disputed.
    estimate = RewardEstimate(torch.tensor([1.0, 2.0, -3.0]), torch.tensor([0.2, 2.0, 2.0]), None, torch.tensor(1.0))
    reference, nothing = torch.full((3,), 1 / 3), torch.zeros(3)
    plain = told(VarianceAware()).observe(estimate, nothing, 3, lambda x: x)
    ours = told(PrecisionWeighted()).observe(estimate, nothing, 3, lambda x: x)
    steps = [reinforced(reference, reference, s.reward, s.kl_weight, BETA) for s in (plain, ours)]
    assert steps[0].argmax() == 1
    assert steps[1].argmax() == 0


def test_without_differences_in_variance_it_is_the_mean_reward():
    mean = torch.randn(8, generator=torch.Generator().manual_seed(0))
    estimate = RewardEstimate(mean, torch.full((8,), 0.3), None, torch.tensor(0.3))
    score = told(PrecisionWeighted()).observe(estimate, torch.randn(8), 4, lambda x: x)
    torch.testing.assert_close(score.reward, mean)
    torch.testing.assert_close(PrecisionWeighted()(estimate).reward, mean)
