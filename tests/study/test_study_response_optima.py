"""Optima over known responses: by hand, beside another optimiser, and what each repetition learns from."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.optimize import minimize

from lit_vapo.functional import match_kl, optimal_policy
from lit_vapo.functional import objective as objective_value
from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.rewards.members.bayesian import BayesianLinear
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.study.experiment import Repetition
from lit_vapo.study.experiments.learner import Learner, examine
from lit_vapo.study.experiments.responses import EXPONENTS, KnownResponses, ResponseOptima
from lit_vapo.types import RewardEstimate

WIDTH, PAIRS = 3, 40


def known(prompts=4, count=5):
    """Responses whose worth is their first feature, and pairs that say so."""
    generator = torch.Generator().manual_seed(0)
    responses = torch.randn(prompts, count, WIDTH, generator=generator)
    chosen, rejected = torch.randn(2, PAIRS, WIDTH, generator=generator)
    chosen[:, 0], rejected[:, 0] = rejected[:, 0].abs() + 1, -rejected[:, 0].abs()
    return KnownResponses(responses, responses[..., 0], chosen, rejected)


def study(folder, methods=None, pairs=20, flipped=0.0, **options):
    return ResponseOptima(str(folder), methods or {"mean": MeanReward()}, [pairs], [flipped], steps=50, **options)


@pytest.fixture
def prepared(tmp_path):
    known().save(tmp_path)
    return tmp_path


class Says:
    """Stands for an ensemble: features are the mean, the variance and nothing."""

    num_members = 2

    def __init__(self, reference):
        self.reference_variance = reference[:, 1].mean()

    def __call__(self, features):
        mean, spread = features[:, 0], features[:, 1].sqrt() / 2**0.5
        return RewardEstimate(mean, features[:, 1], torch.stack([mean - spread, mean + spread], 1))


@pytest.fixture
def says(monkeypatch):
    monkeypatch.setattr(Learner, "learn", lambda self, pairs, reference, seed: Says(reference))


def test_optima_of_two_responses_by_hand(tmp_path, says):
    # The second prompt's rewards are equal, so its policy stays; its true returns are 0 and 1.
    features = torch.tensor([[[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]], [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]])
    true = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    KnownResponses(features, true, torch.ones(3, WIDTH), torch.zeros(3, WIDTH)).save(tmp_path)
    (record,) = study(tmp_path, pairs=3, kl_coef=0.5).run("pairs=3", Repetition(0, 0))
    # At β = ½ the log-odds are 2 / ½ = 4.
    p = 1 / (1 + math.exp(-4))
    assert record.reference_return == pytest.approx(0.5)
    assert record.gain == pytest.approx((p + 0.5) / 2 - 0.5)
    kl = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    assert record.kl[record.final] == pytest.approx(kl / 2)
    assert len(record.kl) == len(EXPONENTS)
    assert record.kl == sorted(record.kl)
    assert record.kl[-1] <= math.log(2) / 2


def test_weighted_optima_are_those_of_another_optimiser(tmp_path, says):
    mean = torch.tensor([[0.3, -0.2, 1.0], [2.0, 0.1, -1.0]])
    variance = torch.tensor([[0.5, 2.0, 1.5], [3.0, 0.2, 0.8]])
    features, true = torch.stack([mean, variance, mean], 2), torch.tensor([[0.0, 1.0, 3.0], [2.0, -1.0, 0.0]])
    KnownResponses(features, true, torch.ones(3, WIDTH), torch.zeros(3, WIDTH)).save(tmp_path)
    methods = {"aware": VarianceAware(min_weight=0.0)}
    (record,) = study(tmp_path, methods, pairs=3, kl_coef=0.7).run("pairs=3", Repetition(0, 0))
    # The scale `reference`: σ² over its mean on the reference, which is 4/3 here.
    weight, reference = variance.double() / (4 / 3), torch.full((3,), 1 / 3, dtype=torch.float64)
    worth = []
    for prompt in range(2):

        def loss(logits, prompt=prompt):
            policy = torch.softmax(torch.from_numpy(logits), 0)
            return -float(objective_value(policy, mean[prompt].double(), reference, 0.7, weight[prompt]))

        found = minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-9})
        worth.append(float((torch.softmax(torch.from_numpy(found.x), 0) * true[prompt]).sum()))
    assert record.true_return[record.final] == pytest.approx(sum(worth) / 2, abs=1e-5)


def test_ensembles_gain_by_the_truth_and_by_a_coin_as_often_lose(prepared):
    def gains(flipped):
        experiment = study(prepared, flipped=flipped)
        (setting,) = experiment.settings
        return [experiment.run(setting, Repetition(n, n))[0].gain for n in range(8)]

    clear, coin = gains(0.0), gains(0.5)
    assert min(clear) > 0
    assert sum(clear) / 8 > 0.1
    assert min(coin) < 0 < max(coin)


def test_gain_at_a_kl_is_that_of_the_optimum_there(tmp_path, says):
    generator = torch.Generator().manual_seed(0)
    features, true = torch.rand(1, 8, WIDTH, generator=generator) * 2, torch.randn(1, 8, generator=generator)
    KnownResponses(features, true, torch.ones(3, WIDTH), torch.zeros(3, WIDTH)).save(tmp_path)
    (record,) = study(tmp_path, {"aware": VarianceAware(min_weight=0.0)}, pairs=3).run("pairs=3", Repetition(0, 0))
    mean, variance, start = features[..., 0].double(), features[..., 1].double(), torch.full((1, 8), 1 / 8).double()
    for level in (0.03, 0.1, 0.3):
        exact = match_kl(lambda coef: optimal_policy(mean, start, coef, variance / variance.mean()), start, level)
        gain = float((exact * true).sum() - true.double().mean())
        assert record.gain_at(level) == pytest.approx(gain, rel=2e-3)


def test_preferences_are_each_used_once_and_drawn_anew(prepared):
    experiment = study(prepared)
    drawn = experiment.preferences(PAIRS, 0.0, seed=1)
    there = sorted(experiment.known.chosen[:, 1].tolist())
    assert sorted(drawn.chosen[:, 1].tolist()) == there
    fewer = [experiment.preferences(10, 0.0, seed=seed).chosen[:, 1].tolist() for seed in (1, 2, 1)]
    assert fewer[0] == fewer[2] != fewer[1]
    turned = experiment.preferences(PAIRS, 0.5, seed=1)
    assert 8 <= int((turned.chosen[:, 0] < turned.rejected[:, 0]).sum()) <= 32


def test_a_repetition_does_not_depend_on_its_block_or_on_what_ran_before(prepared):
    experiment = study(prepared, {"mean": MeanReward(), "aware": VarianceAware()}, flipped=0.3)
    (setting,) = experiment.settings
    block = experiment.run_block(setting, [Repetition(0, 5), Repetition(1, 6)])
    torch.manual_seed(99)
    alone = study(prepared, {"aware": VarianceAware()}, flipped=0.3).run(setting, Repetition(1, 6))
    assert alone == [block[3]]
    assert block[1].true_return != block[3].true_return


def test_what_an_ensemble_knows_by_hand():
    # Less their means, rewards are ∓1 and ∓2, the truth ∓2 and ∓1: over √2.5 either, a correlation of 0.8.
    mean, true = torch.tensor([[0.0, 2.0], [5.0, 9.0]]), torch.tensor([[7.0, 11.0], [0.0, 2.0]])
    found = examine(mean, torch.tensor([[1.0, 4.0], [9.0, 4.0]]), true)
    assert found["correlation"] == pytest.approx(0.8)
    # σ is 1, 2, 3 and 2.
    assert found["sigma_spread"] == pytest.approx((2 / 3) ** 0.5 / 2)
    exact = examine(mean, torch.zeros(2, 2), mean)
    assert exact == {"correlation": pytest.approx(1.0)}
    # Over √5 rewards are ±0.45 and ±1.34: off by 0.55 where σ is 1, and by 0.34 where it is 3.
    rewards, true = torch.tensor([[1.0, -1.0, 3.0, -3.0]]), torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert examine(rewards, torch.tensor([[1.0, 1.0, 9.0, 9.0]]), true)["sigma_error"] == pytest.approx(-1.0)


def test_records_tell_what_the_ensemble_knows(prepared):
    (good,), (poor,) = (
        study(prepared, pairs=PAIRS, flipped=flipped).run(f"pairs={PAIRS}", Repetition(0, 0)) for flipped in (0.0, 0.5)
    )
    assert good.extra["correlation"] > 0.8 > poor.extra["correlation"]
    assert good.extra["sigma_spread"] > 0
    assert -1 <= good.extra["sigma_error"] <= 1


def test_every_estimator_is_a_setting(prepared, monkeypatch):
    heads = {"four": HeadEnsemble(4), "exact": BayesianLinear(4)}
    experiment = study(prepared, heads=heads, flipped=0.3)
    learn, learned = Learner.learn, []

    def spy(self, pairs, reference, seed):
        learned.append(learn(self, pairs, reference, seed))
        return learned[-1]

    monkeypatch.setattr(Learner, "learn", spy)
    assert list(experiment.settings) == ["four,pairs=20", "exact,pairs=20"]
    returns = [experiment.run(setting, Repetition(0, 3))[0].true_return for setting in experiment.settings]
    assert [(type(head), head.seed) for head in learned] == [(HeadEnsemble, 3), (BayesianLinear, 3)]
    assert returns[0] != returns[1]


def test_what_is_not_there_is_said(prepared, tmp_path):
    with pytest.raises(ValueError, match=r"pairs: expected at most the 40 there are, got 41"):
        study(prepared, pairs=41).run("pairs=41", Repetition(0, 0))
    with pytest.raises(ValueError, match=r"prepared: expected a folder with responses\.safetensors, got .*nowhere"):
        KnownResponses.load(tmp_path / "nowhere")
    wrong = known()._replace(true=torch.zeros(4, 6))._asdict()
    save_file(wrong, tmp_path / "responses.safetensors")
    with pytest.raises(ValueError, match=r"responses\.safetensors: expected .*true \(P, N\).*got .*'true': \(4, 6\)"):
        KnownResponses.load(tmp_path)
    with pytest.raises(ValueError, match="methods: expected at least one"):
        ResponseOptima(str(prepared), {}, [4], [0.0])
    with pytest.raises(ValueError, match="kl_coef: expected a number > 0, got 0"):
        study(prepared, kl_coef=0)
    with pytest.raises(ValueError, match="head_learning_rate: expected a number > 0, got 0"):
        study(prepared, head_learning_rate=0)
