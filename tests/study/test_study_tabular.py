"""Level 1 against the theory: risk formulas, limits, and what a wrong variance is."""

import numpy as np
import pytest
import torch

from lit_vapo.functional import risk_vanilla, risk_variance_aware
from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.objectives.single_reward import SingleReward
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.study.experiment import Joined, Repetition, seed_of
from lit_vapo.study.experiments import variance
from lit_vapo.study.experiments.tabular import Method, Optima, SmallSteps, World, _ensembles
from lit_vapo.study.summary import formulas

METHODS = {"single": Method(SingleReward()), "mean": Method(MeanReward()), "aware": Method(VarianceAware())}


def optima(methods=METHODS, **options):
    given = {"noise_ratio": [10], "members": [4], "correlation": [0.5], "kl_coef": [4]}
    return Optima(methods, **given | options)


def repetitions(count, setting="x"):
    return [Repetition(n, seed_of(0, setting, n)) for n in range(count)]


def by_method(records):
    return {name: [r for r in records if r.method == name] for name in dict.fromkeys(r.method for r in records)}


@pytest.mark.parametrize("ratio", [1, 3, 10, 30])
def test_small_steps_have_the_risk_of_the_formulas(ratio):
    experiment = SmallSteps([ratio])
    (setting,) = experiment.settings
    found = formulas(experiment.run_block(setting, repetitions(2000, setting)))
    assert [row["method"] for row in found] == ["small step, plain", "small step, variance-aware"]
    assert all(abs(row["z"]) < 3 for row in found)
    plain, aware = (row["exact"] for row in found)
    assert aware < plain if ratio > 1 else aware == pytest.approx(plain)


def test_optima_near_the_reference_have_the_risk_of_the_formulas():
    # Far from the formulas' own code: the whole ensemble, objective and optimum, at hardly any KL. The noise of a
    # mean of K members that share ρ of their variance is (ρ + (1 − ρ)/K) · Σ.
    wide = VarianceAware(min_weight=0, max_weight=1e9)
    methods = {"mean": Method(MeanReward()), "aware": Method(wide, variance.Honest(exact=True))}
    experiment = optima(methods, kl_coef=[300])
    (setting,) = experiment.settings
    found = by_method(experiment.run_block(setting, repetitions(1000)))
    true, sigma = experiment.world.draw(0, 10)
    noise = sigma.square() * (0.5 + 0.5 / 4)
    for name, risk in (("mean", risk_vanilla(true, noise)), ("aware", risk_variance_aware(true, noise))):
        seen, exact = np.mean([r.true_return[0] < r.reference_return for r in found[name]]), float(risk)
        assert abs(seen - exact) < 3 * (exact * (1 - exact) / 1000) ** 0.5


def test_members_share_as_much_of_their_noise_as_they_should():
    true, sigma = World(responses=4, noise=2.0).draw(0, 3)
    rewards, draws = _ensembles(true, sigma, 3, 0.2, repetitions(4000))
    noise = rewards - true[:, None]
    # Covariance of members: σ² for one with itself, 0.2 σ² for two of them, within five standard errors.
    for response, square in enumerate(sigma.square()):
        expected = square * (0.2 + 0.8 * torch.eye(3, dtype=torch.float64))
        torch.testing.assert_close(noise[:, response].T.cov(), expected, rtol=0, atol=5 * square * (2 / 4000) ** 0.5)
    # What members show of it is the part they do not share.
    torch.testing.assert_close(draws.members.mean(0), 0.8 * sigma.square(), rtol=0.1, atol=0)


def test_a_block_is_its_repetitions():
    for experiment in (optima(), SmallSteps([3])):
        (setting,) = experiment.settings
        block = experiment.run_block(setting, repetitions(5))
        alone = [record for r in repetitions(5) for record in experiment.run(setting, r)]
        key = lambda r: (r.repetition, r.method)  # noqa: E731
        for a, b in zip(sorted(block, key=key), sorted(alone, key=key), strict=True):
            assert a.true_return == pytest.approx(b.true_return, abs=2e-8)
            assert a.kl == pytest.approx(b.kl, abs=2e-8)
            assert (a.method, a.setting, a.seed, a.final) == (b.method, b.setting, b.seed, b.final)


def test_methods_and_settings_share_their_draws():
    # More members leave the first one, and so the single reward, as it was.
    experiment = optima(members=[2, 8])
    few, many = (by_method(experiment.run_block(s, repetitions(3))) for s in experiment.settings)
    assert [r.true_return for r in few["single"]] == [r.true_return for r in many["single"]]
    assert [r.true_return for r in few["mean"]] != [r.true_return for r in many["mean"]]


@pytest.mark.parametrize(
    ("told", "ratio"),
    [(variance.Constant(), 10), (variance.Power(0), 10), (variance.Honest(exact=True), 1)],
)
def test_without_differences_in_variance_the_method_is_plain(told, ratio):
    experiment = optima({"mean": Method(MeanReward()), "aware": Method(VarianceAware(), told)}, noise_ratio=[ratio])
    (setting,) = experiment.settings
    found = by_method(experiment.run_block(setting, repetitions(20)))
    for a, b in zip(found["mean"], found["aware"], strict=True):
        assert a.true_return == pytest.approx(b.true_return, abs=1e-6)
        assert a.kl == pytest.approx(b.kl, abs=1e-6)


def test_runs_move_away_and_are_judged_at_beta():
    experiment = optima(kl_coef=[4, 8])
    at_4, at_8 = (by_method(experiment.run_block(s, repetitions(4)))["mean"] for s in experiment.settings)
    for near, far in zip(at_8, at_4, strict=True):
        assert far.kl == sorted(far.kl)
        # The point before β = 4 is β = 8.
        assert far.kl[far.final - 1] == pytest.approx(near.kl[near.final], abs=1e-8)


def test_worlds_keep_the_amount_of_noise():
    world = World(responses=20, noise=3.0)
    for ratio in (1, 30):
        true, sigma = world.draw(1, ratio)
        assert sigma.square().mean().sqrt().item() == pytest.approx(3.0)
        assert (sigma.max() / sigma.min()).item() == pytest.approx(ratio)
        assert torch.equal(true, world.draw(1, 5)[0])
    assert not torch.equal(world.draw(0, 3)[0], world.draw(1, 3)[0])


def test_objectives_are_added_and_so_are_the_variances_of_their_ensembles():
    one, two = optima(), optima(objectives=[2])
    (params,) = two.settings.values()
    true, rewards, draws = two._landscape(params, repetitions(3000))
    first, second = (two.world.draw(0, 10, objective) for objective in range(2))
    assert torch.equal(first[0], one.world.draw(0, 10)[0])
    assert not torch.equal(first[1].argsort(), second[1].argsort())
    torch.testing.assert_close(true, (first[0] + second[0]) / 2**0.5)
    noise = (first[1].square() + second[1].square()) / 2
    torch.testing.assert_close(draws.true, noise)
    error = rewards - true[:, None]
    torch.testing.assert_close(error.var((0, 2)), noise, rtol=0.1, atol=0)
    # Separate ensembles: what one objective's members say of their variance is not mixed with the other's. Members that
    # have half of their noise in common show the other half.
    torch.testing.assert_close(draws.members.mean(0), noise / 2, rtol=0.1, atol=0)
    # A better known variance than that of one ensemble of their sums.
    spread = (draws.members / (noise / 2)).var(0).mean()
    assert float(spread) < 0.95 * float((rewards.var(-1) / (noise / 2)).var(0).mean())


def test_the_first_objective_is_what_it_would_be_alone():
    alone = optima(objectives=[1]).run_block("noise_ratio=10", repetitions(5))
    among = optima(objectives=[1, 2]).run_block("objectives=1", repetitions(5))
    assert [r.true_return for r in alone] == [r.true_return for r in among]
    # And what it was before there were several: studies that exist go on.
    reward, _ = World(responses=10, noise=4.0).draw(3, 10)
    np.testing.assert_array_equal(reward, np.random.default_rng(3).standard_normal(10))
    with pytest.raises(ValueError, match=r"objectives: expected numbers of at least 1, got \[0\]"):
        optima(objectives=[0])


def test_what_objectives_are_told_by_hand():
    members = torch.tensor([[1.0, 2.0, 4.0, 9.0]])
    true = torch.tensor([1.0, 1.0, 5.0, 3.0])
    draws = variance.Draws(members, true, torch.tensor([[0.0, 1.0, -1.0, 0.0]]), torch.tensor([[3, 0, 1, 2]]))

    def check(told, expected):
        torch.testing.assert_close(told(draws), torch.tensor([expected]))

    check(variance.Honest(), [1.0, 2.0, 4.0, 9.0])
    check(variance.Honest(exact=True), [1.0, 1.0, 5.0, 3.0])
    check(variance.Power(0.5), [1.0, 2**0.5, 2.0, 3.0])
    check(variance.LogNormal(np.log(2)), [1.0, 4.0, 2.0, 9.0])
    check(variance.Shuffled(), [9.0, 1.0, 2.0, 4.0])
    check(variance.Constant(), [4.0] * 4)
    check(variance.Inverted(), [1.0, 0.5, 0.25, 1 / 9])
    # Half of the responses: the third and the fourth have the most noise.
    check(variance.Understated(share=0.5, factor=0.1), [1.0, 2.0, 0.4, 0.9])


def test_joined_experiments_keep_their_records():
    inner = SmallSteps([1, 3])
    joined = Joined({"steps": inner, "optima": optima(block_size=7)})
    assert list(joined.settings) == ["steps:noise_ratio=1", "steps:noise_ratio=3", "optima:noise_ratio=10"]
    assert joined.block_size == 7
    (a, b), (c, d) = joined.run("steps:noise_ratio=3", Repetition(0, 5)), inner.run("noise_ratio=3", Repetition(0, 5))
    assert (a.setting, a.true_return, b.true_return) == ("steps:noise_ratio=3", c.true_return, d.true_return)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optima(noise_ratio=[3, 3]), r"noise_ratio: expected a list of different values, got \[3, 3\]"),
        (lambda: optima(members=[]), r"members: expected a list of different values, got \[\]"),
        (lambda: optima({}), "methods: expected at least one"),
        (lambda: World(responses=2, noise=1.0), "expected responses >= 3 and noise > 0, got 2"),
        (lambda: Joined({}), "experiments: expected at least one"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
