"""Objectives that are told another variance: what reaches them, by hand, and what does not change."""

import math

import pytest
import torch

from lit_vapo.objectives.covariance_aware import CovarianceAware
from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.objectives.precision_weighted import PrecisionWeighted
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.study.experiments.variance import (
    Constant,
    Honest,
    Inverted,
    LogNormal,
    Moderated,
    Power,
    Shuffled,
    Told,
    Understated,
)
from lit_vapo.types import RewardEstimate

# Variances 1, 4 and 16 at a reference mean of 4: weights ¼, 1 and 4.
MEMBERS = torch.tensor([[0.0, 2**0.5], [1.0, 1 + 8**0.5], [-1.0, -1 + 32**0.5]])
ESTIMATE = RewardEstimate(MEMBERS.mean(1), MEMBERS.var(1), MEMBERS, torch.tensor(4.0))


def weights(variance, estimate=ESTIMATE):
    objective = Told(VarianceAware(min_weight=0, max_weight=1e9), variance)
    score = objective(estimate)
    torch.testing.assert_close(score.reward, estimate.mean)
    return score.kl_weight


@pytest.mark.parametrize(
    ("variance", "expected"),
    [
        (Honest(), [0.25, 1, 4]),
        (Power(0.5), [0.5, 1, 2]),
        (Power(0.0), [1, 1, 1]),
        (Power(2.0), [1 / 16, 1, 16]),
        (Inverted(), [4, 1, 0.25]),
        (Constant(), [1.75, 1.75, 1.75]),
        (Understated(share=0.34, factor=0.01), [0.25, 1, 0.04]),
        (LogNormal(0.0), [0.25, 1, 4]),
    ],
)
def test_weights_by_hand(variance, expected):
    torch.testing.assert_close(weights(variance), torch.tensor(expected, dtype=torch.float32))


def test_a_moderated_variance_by_hand():
    # Two degrees of freedom and log-variances ±π/√6: typical 1, a share of one half (tests/functional).
    variance = torch.tensor([math.exp(-math.pi / 6**0.5), math.exp(math.pi / 6**0.5)])
    estimate = RewardEstimate(torch.zeros(2), variance, None, torch.tensor(1.0))
    torch.testing.assert_close(weights(Moderated(3), estimate), (1 + variance) / 2)


def test_chance_is_its_own():
    many = RewardEstimate(torch.zeros(400), torch.linspace(1, 9, 400), None, torch.tensor(4.0))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    shuffled, noisy = weights(Shuffled(), many), weights(LogNormal(1.0), many)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(weights(Shuffled(), many), shuffled)
    torch.testing.assert_close(shuffled.sort().values, many.variance / 4)
    assert abs(float(torch.stack([shuffled, many.variance]).corrcoef()[0, 1])) < 0.15
    logs = (noisy / (many.variance / 4)).log()
    assert float(logs.mean()) == pytest.approx(0, abs=0.15)
    assert float(logs.std()) == pytest.approx(1, abs=0.1)


def test_what_the_objective_refuses_and_logs_is_passed_on():
    objective = Told(CovarianceAware(per_prompt=True), Honest())
    with pytest.raises(ValueError, match="num_responses"):
        objective.check_responses(1)
    with pytest.raises(ValueError, match=r"Told needs the variance of an ensemble: expected at least 2 members"):
        objective.check_members(1)
    with pytest.raises(ValueError, match="member: expected an index below the 2 members, got 5"):
        Told(VarianceAware(member=5), Honest()).check_members(2)
    plain = CovarianceAware()
    told = Told(CovarianceAware(), Honest())
    for one in (plain, told):
        one.prepare(2)
    scores = [one.observe(ESTIMATE, torch.zeros(3), 1, lambda x: x) for one in (plain, told)]
    torch.testing.assert_close(scores[0].reward, scores[1].reward)
    assert told.statistics().keys() == plain.statistics().keys() != set()


def test_what_would_do_nothing_is_refused():
    with pytest.raises(ValueError, match="objective: expected one that uses the variance, got MeanReward"):
        Told(MeanReward(), Honest())
    with pytest.raises(ValueError, match=r"variance\.exact: expected false"):
        Told(VarianceAware(), Honest(exact=True))


def test_the_price_of_a_nat_reaches_the_objective():
    told, alone = Told(PrecisionWeighted(), Honest()), PrecisionWeighted()
    scores = []
    for objective in (told, alone):
        objective.price(torch.tensor(0.5))
        scores.append(objective.observe(ESTIMATE, torch.tensor([0.0, 2.0, -1.0]), 3, lambda x: x))
    torch.testing.assert_close(*scores)
