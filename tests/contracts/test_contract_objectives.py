"""Every objective passes this suite; a new file under lit_vapo/objectives/ is found and tested unasked."""

import pytest
import torch
from helpers import concrete_subclasses

import lit_vapo.objectives
from lit_vapo.functional import ensemble_estimate, fit_normaliser, normalise_members
from lit_vapo.objectives.base import Objective
from lit_vapo.objectives.conditional_value_at_risk import ConditionalValueAtRisk
from lit_vapo.objectives.covariance_aware import CovarianceAware
from lit_vapo.objectives.entropic import Entropic
from lit_vapo.objectives.lower_confidence import LowerConfidence
from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.objectives.precision_weighted import PrecisionWeighted
from lit_vapo.objectives.single_reward import SingleReward
from lit_vapo.objectives.uncertainty_weighted import UncertaintyWeighted
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.objectives.worst_case import WorstCase
from lit_vapo.types import RewardEstimate

OBJECTIVES = concrete_subclasses(lit_vapo.objectives, Objective)


def members(batch=64, count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, generator=generator) * torch.rand(batch, 1, generator=generator)


def prepared(kind, count=5):
    objective = kind()
    objective.prepare(count)
    return objective


def estimated(members, variance=0.5):
    """What an ensemble says that was calibrated where σ² was `variance`."""
    return ensemble_estimate(members)._replace(reference_variance=torch.tensor(variance))


def in_evaluation(objective, estimate):
    return objective(estimate)


def in_training(objective, estimate):
    return objective.observe(estimate, torch.zeros_like(estimate.mean), 1, lambda x: x)


SCORED = pytest.mark.parametrize("scored", [in_evaluation, in_training])


def test_all_are_discovered():
    found = {MeanReward, SingleReward, VarianceAware, WorstCase, UncertaintyWeighted, LowerConfidence, CovarianceAware}
    assert found | {Entropic, ConditionalValueAtRisk, PrecisionWeighted} <= set(OBJECTIVES)


@SCORED
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_shapes_finiteness_and_sign_of_the_weight(kind, scored):
    score = scored(prepared(kind), estimated(members()))
    assert score.reward.shape == score.kl_weight.shape == (64,)
    assert torch.isfinite(score.reward).all()
    assert torch.isfinite(score.kl_weight).all()
    assert (score.kl_weight >= 0).all()


@SCORED
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_permuting_members_changes_nothing(kind, scored):
    if kind is SingleReward:
        pytest.skip("chooses a member by its place")
    scores = members()
    one = scored(prepared(kind), estimated(scores))
    two = scored(prepared(kind), estimated(scores[:, [4, 2, 0, 1, 3]]))
    torch.testing.assert_close(one, two)


@SCORED
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_what_one_member_adds_to_every_response_changes_nothing_after_centring(kind, scored):
    scores, reference = members(), members(seed=1)
    both = []
    for offset in (torch.zeros(5), torch.tensor([0.0, 7.0, 0.0, 0.0, -3.0])):
        loc, scale = fit_normaliser(reference + offset)
        both.append(scored(prepared(kind), estimated(normalise_members(scores + offset, loc, scale))))
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)


@SCORED
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_equal_members_give_the_mean_reward(kind, scored):
    scores = members()[:, :1].expand(-1, 5)
    score = scored(prepared(kind), estimated(scores, variance=0.0))
    torch.testing.assert_close(score, prepared(MeanReward)(estimated(scores)))


@SCORED
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_an_estimate_without_members_is_scored_or_refused_by_name(kind, scored):
    estimate = estimated(members())._replace(members=None)
    try:
        score = scored(prepared(kind), estimate)
    except ValueError as error:
        assert str(error).startswith(f"{kind.__name__}: expected an ensemble with separate members")  # noqa: PT017
    else:
        assert torch.isfinite(score.reward).all()


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_evaluation_leaves_no_trace(kind):
    objective = prepared(kind)
    in_training(objective, estimated(members(seed=1)))
    before = {name: x.clone() for name, x in objective.state_dict().items()}
    estimate = estimated(members())
    torch.testing.assert_close(objective(estimate), objective(estimate))
    torch.testing.assert_close(dict(objective.state_dict()), before)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_statistics_are_scalars(kind):
    objective = prepared(kind)
    in_training(objective, estimated(members()))
    assert all(x.shape == () and torch.isfinite(x) for x in objective.statistics().values())


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_single_member_is_refused_where_a_variance_is_needed(kind):
    if kind.needs_variance:
        with pytest.raises(ValueError, match="expected at least 2 members, got 1"):
            prepared(kind, count=1)
    else:
        prepared(kind, count=1)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_state_survives_a_round_trip(kind):
    objective, again = prepared(kind), prepared(kind)
    in_training(objective, estimated(members()))
    again.load_state_dict(objective.state_dict())
    estimate = estimated(members(seed=1))
    torch.testing.assert_close(objective(estimate), again(estimate))
    torch.testing.assert_close(in_training(objective, estimate), in_training(again, estimate))


def test_variance_aware_by_hand():
    # σ² = 0.5, 2, 8 with a reference of 2 → 0.25, 1, 4; clamped to [0.5, 3] → 0.5, 1, 3
    estimate = RewardEstimate(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 2.0, 8.0]), None, torch.tensor(2.0))
    objective = VarianceAware(min_weight=0.5, max_weight=3.0)
    score = objective(estimate)
    torch.testing.assert_close(score.kl_weight, torch.tensor([0.5, 1.0, 3.0]))
    torch.testing.assert_close(score.reward, estimate.mean)


def test_scale_none_is_the_raw_variance():
    estimate = RewardEstimate(torch.zeros(2), torch.tensor([0.5, 2.0]), None)
    objective = VarianceAware(scale="none", min_weight=0.0, max_weight=100.0)
    torch.testing.assert_close(objective(estimate).kl_weight, estimate.variance)


def test_reference_scale_has_mean_one_over_the_reference():
    estimate = ensemble_estimate(members(4000))
    estimate = estimate._replace(reference_variance=estimate.variance.mean())
    objective = VarianceAware(min_weight=0.0, max_weight=1e9)
    torch.testing.assert_close(objective(estimate).kl_weight.mean(), torch.tensor(1.0))


def test_constant_variance_gives_plain_rlhf():
    estimate = RewardEstimate(torch.randn(8), torch.full((8,), 0.3), None, torch.tensor(0.3))
    objective = VarianceAware()
    torch.testing.assert_close(objective(estimate).kl_weight, torch.ones(8))


def test_conservative_rewards_by_hand():
    # Members 1, 2, 6: mean 3, unbiased variance (4 + 1 + 9) / 2 = 7. Members 2, 2, 2: mean 2, variance 0.
    estimate = estimated(torch.tensor([[1.0, 2.0, 6.0], [2.0, 2.0, 2.0]]))
    for objective, first in (
        (WorstCase(), 1.0),
        (UncertaintyWeighted(0.5), 3 - 0.5 * 7),
        (LowerConfidence(2.0), 3 - 2 * 7**0.5),
    ):
        score = objective(estimate)
        torch.testing.assert_close(score.reward, torch.tensor([first, 2.0]))
        torch.testing.assert_close(score.kl_weight, torch.ones(2))


@pytest.mark.parametrize("kind", [UncertaintyWeighted, LowerConfidence])
def test_no_penalty_is_the_mean_reward(kind):
    estimate = estimated(members())
    torch.testing.assert_close(kind(penalty=0.0)(estimate), MeanReward()(estimate))


@pytest.mark.parametrize("kind", [UncertaintyWeighted, LowerConfidence, WorstCase, Entropic, ConditionalValueAtRisk])
def test_doubt_never_raises_a_reward(kind):
    estimate = estimated(members())
    assert (kind()(estimate).reward <= estimate.mean).all()


def test_a_members_reward_with_the_ensembles_variance():
    scores = members()
    objective = VarianceAware(member=2)
    torch.testing.assert_close(objective(estimated(scores)).reward, scores[:, 2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: VarianceAware(min_weight=2.0, max_weight=1.0),
            "expected 0 <= min_weight <= max_weight, got 2.0 and 1.0",
        ),
        (lambda: VarianceAware(min_weight=-1.0), "expected 0 <= min_weight"),
        (lambda: UncertaintyWeighted(-1), "penalty: expected a number of 0 or more, got -1"),
        (lambda: LowerConfidence(float("nan")), "penalty: expected a number of 0 or more, got nan"),
        (
            lambda: WorstCase()(RewardEstimate(torch.zeros(1), torch.zeros(1), None)),
            "WorstCase: expected an ensemble with separate members",
        ),
        (lambda: SingleReward(-1), "expected a number of 0 or more, got -1"),
        (lambda: SingleReward(5).check_members(5), "expected an index below the 5 members, got 5"),
        (lambda: VarianceAware(member=3).check_members(3), "expected an index below the 3 members, got 3"),
        (
            lambda: SingleReward(0)(RewardEstimate(torch.zeros(1), torch.zeros(1), None)),
            "SingleReward: expected an ensemble with separate members",
        ),
        (lambda: CovarianceAware(-1), "penalty: expected a number of 0 or more, got -1"),
        (lambda: CovarianceAware(window=-1), "window: expected a number of 0 or more, got -1"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
