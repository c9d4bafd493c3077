"""Entropic and ConditionalValueAtRisk: which objectives they become in their limits, and what a tied c follows."""

import math

import ppo_helpers
import pytest
import torch

from lit_vapo.functional import ensemble_estimate
from lit_vapo.objectives.conditional_value_at_risk import ConditionalValueAtRisk
from lit_vapo.objectives.entropic import Entropic
from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.objectives.uncertainty_weighted import UncertaintyWeighted
from lit_vapo.objectives.worst_case import WorstCase
from lit_vapo.types import RewardEstimate


def estimated(spread=1.0, count=5):
    return ensemble_estimate(spread * torch.randn(64, count, generator=torch.Generator().manual_seed(0)) + 0.3)


def told(objective, coef):
    objective.price(torch.tensor(coef))
    return objective


def test_entropic_by_hand():
    # Members 0 and log 3 at c = 1: exp(-r) = 1 and 1/3, mean 2/3. Gaussian: mean log(3)/2, σ² = log(3)²/2.
    estimate = ensemble_estimate(torch.tensor([[0.0, math.log(3)]]))
    assert Entropic()(estimate).reward.item() == pytest.approx(-math.log(2 / 3), rel=1e-6)
    expected = math.log(3) / 2 - math.log(3) ** 2 / (4 * 0.5)
    assert Entropic(0.5, "gaussian")(estimate).reward.item() == pytest.approx(expected, rel=1e-6)


def test_entropic_is_the_worst_case_without_temperature_and_the_mean_with_a_high_one():
    estimate = estimated(count=4)
    torch.testing.assert_close(Entropic(1e-4)(estimate), WorstCase()(estimate), rtol=1e-3, atol=2e-4)
    for form in ("members", "gaussian"):
        torch.testing.assert_close(Entropic(1e9, form)(estimate), MeanReward()(estimate))


def test_entropic_is_uncertainty_weighted_where_members_differ_little():
    # σ² has ddof 1, the second cumulant of K members ddof 0: λ = (K - 1)/(2cK) = 4/(2·0.5·5).
    estimate = estimated(spread=1e-2)
    near = UncertaintyWeighted(0.8)(estimate).reward
    penalty = (estimate.mean - near).double()
    gap = ((estimate.mean - Entropic(0.5)(estimate).reward).double() - penalty) / penalty
    assert gap.abs().max() < 0.05
    # With a normal distribution there is no need for them to differ little.
    wide = estimated(spread=3.0)
    torch.testing.assert_close(Entropic(0.5, "gaussian")(wide), UncertaintyWeighted(1.0)(wide))


def test_few_members_see_less_of_the_tail_than_their_normal_distribution():
    # 20 000 draws of N(0, 1) at c = 0.5: the truth is -σ²/(2c) = -1. Five at a time see less, as the bound says.
    draws = torch.randn(20_000, 5, generator=torch.Generator().manual_seed(1))
    few = Entropic(0.5)(ensemble_estimate(draws)).reward.mean()
    gaussian = Entropic(0.5, "gaussian")(ensemble_estimate(draws)).reward.mean()
    assert gaussian.item() == pytest.approx(-1, abs=0.03)
    assert few.item() > -0.75


def test_conditional_value_at_risk_by_hand_and_in_its_limits():
    # Members 0, 1, 5, 9 and α = 0.625, two and a half of them: (0 + 1 + 5/2)/2.5 = 1.4.
    one = ensemble_estimate(torch.tensor([[5.0, 0.0, 9.0, 1.0]]))
    assert ConditionalValueAtRisk(0.625)(one).reward.item() == pytest.approx(1.4)
    estimate = estimated()
    torch.testing.assert_close(ConditionalValueAtRisk(1.0)(estimate), MeanReward()(estimate))
    for share in (0.2, 0.03):
        torch.testing.assert_close(ConditionalValueAtRisk(share)(estimate), WorstCase()(estimate))


def test_a_tied_temperature_follows_the_price_and_a_free_one_does_not():
    estimate = estimated()
    for form in ("members", "gaussian"):
        tied = told(Entropic(2.0, form, tied=True), 0.25)
        torch.testing.assert_close(tied(estimate), Entropic(0.5, form)(estimate))
        torch.testing.assert_close(told(tied, 0.5)(estimate), Entropic(1.0, form)(estimate))
        torch.testing.assert_close(told(Entropic(0.5, form), 0.1)(estimate), Entropic(0.5, form)(estimate))


def test_a_cheaper_nat_makes_a_tied_objective_more_pessimistic():
    estimate, objective = estimated(), Entropic(tied=True)
    rewards = [told(objective, coef)(estimate).reward.mean().item() for coef in (10.0, 1.0, 0.1, 0.01)]
    assert rewards == sorted(rewards, reverse=True)
    assert rewards[-1] == pytest.approx(WorstCase()(estimate).reward.mean().item(), abs=0.02)


def test_the_price_survives_a_round_trip():
    one, other = told(Entropic(tied=True), 0.3), Entropic(tied=True)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(one(estimated()), other(estimated()))


class Watched(Entropic):
    """Keeps every price that it was told, and every c that it scored with."""

    def __init__(self):
        super().__init__(tied=True)
        self.told, self.used = [], []

    def price(self, kl_coef):
        super().price(kl_coef)
        self.told.append(float(kl_coef))

    def forward(self, estimate):
        self.used.append(float(self.coef))
        return super().forward(estimate)


@pytest.fixture(scope="module")
def reward(tiny_model_dir, tmp_path_factory):
    return ppo_helpers.ensemble(tmp_path_factory.mktemp("reward"), tiny_model_dir)


def test_a_run_tells_the_price_before_each_iteration(tiny_model_dir, reward, tmp_path):
    module = ppo_helpers.ppo_module(tiny_model_dir, reward, objective=Watched(), kl_coef=0.2, kl_target=1.0)
    rows = ppo_helpers.fit_ppo(module, ppo_helpers.prompt_data(tiny_model_dir, tmp_path), tmp_path)
    prices = [row["train/kl_coef"] for row in rows]
    assert len(set(prices)) == 4  # it is adapted
    # Once when the module was made, and then before each rollout.
    assert module.objective.told == pytest.approx([0.2, *prices])
    assert module.objective.used == pytest.approx(prices)
    assert float(module.state_dict()["objective.coef"]) == pytest.approx(prices[-1])
    assert "objective.coef" in module.kept_keys()


def test_a_tied_temperature_needs_a_price(tiny_model_dir, reward):
    with pytest.raises(ValueError, match="expected model.kl_coef above 0, got 0"):
        ppo_helpers.ppo_module(tiny_model_dir, reward, objective=Entropic(tied=True), kl_coef=0.0)
    with pytest.raises(ValueError, match="expected to be told β first"):
        Entropic(tied=True)(estimated())
    ppo_helpers.ppo_module(tiny_model_dir, reward, objective=Entropic(), kl_coef=0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Entropic(0.0), "temperature: expected a number above 0, got 0.0"),
        (lambda: ConditionalValueAtRisk(0.0), "share: expected a number above 0 and at most 1, got 0.0"),
        (lambda: ConditionalValueAtRisk(1.01), "share: expected a number above 0 and at most 1, got 1.01"),
        (
            lambda: Entropic().check_members(5, separate=False),
            "objective Entropic looks at each member: expected a source of rewards with separate members",
        ),
        (
            lambda: ConditionalValueAtRisk()(RewardEstimate(torch.zeros(1), torch.zeros(1), None)),
            "ConditionalValueAtRisk: expected an ensemble with separate members",
        ),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_gaussian_form_needs_no_separate_members():
    Entropic(form="gaussian").check_members(5, separate=False)
    estimate = RewardEstimate(torch.tensor([1.0]), torch.tensor([0.5]), None)
    assert Entropic(0.5, "gaussian")(estimate).reward.item() == pytest.approx(0.5)
