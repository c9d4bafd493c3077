"""Several sources as one: how they are put together, calibrated, saved, and what is refused."""

import re

import ppo_helpers
import pytest
import torch

from lit_vapo.functional import ensemble_estimate
from lit_vapo.models.settings import construct, whole_paths
from lit_vapo.models.trunk import Tap
from lit_vapo.objectives.covariance_aware import CovarianceAware
from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.rewards import EnsembleReward, FunctionReward, RewardSource, WeightedSum
from lit_vapo.stages.settings import plain

BATCHES = [torch.arange(4.0), torch.arange(4.0, 7.0)]


class Fixed(RewardSource):
    """Members (B, K) that are multiples of a number of each response; takes numbers for responses."""

    def __init__(self, *factors, taps=(), columns=(), separate=True, calibrated=True):
        super().__init__()
        self.factors = torch.tensor(factors)
        self._taps, self.columns, self.separate_members = taps, columns, separate
        self.done, self.seen = calibrated, []

    num_members = property(lambda self: len(self.factors))
    taps = property(lambda self: self._taps)
    calibrated = property(lambda self: self.done)

    def calibrate(self, references):
        self.seen = [x.tolist() for x in references]
        self.done = True

    def score(self, responses):
        return ensemble_estimate(responses[:, None] * self.factors)._replace(reference_variance=torch.tensor(3.0))


def test_each_source_goes_through_all_references():
    made = WeightedSum(
        {"a": Fixed(1.0, 2.0, calibrated=False), "b": Fixed(1.0), "c": Fixed(0.0, 1.0, calibrated=False)}
    )
    made.prepare(None)
    assert not made.calibrated
    made.calibrate(iter(BATCHES))
    assert made.calibrated
    everything = [x.tolist() for x in BATCHES]
    assert [made.summands[name].seen for name in "abc"] == [everything, [], everything]


def test_the_unit_of_aligned_members_is_measured():
    # Per response x the members are x·(1 - 3) = -2x and x·(2 - 5) = -3x: σ² = x²/2, mean over 0 … 6 of 91/7/2 = 6.5.
    made = WeightedSum({"a": Fixed(1.0, 2.0), "b": Fixed(3.0, 5.0)}, {"b": -1.0}, aligned=True)
    made.prepare(None)
    assert not made.calibrated
    made.calibrate(iter(BATCHES))
    estimate = made.score(torch.tensor([2.0]))
    assert estimate.members.tolist() == [[-4.0, -6.0]]
    assert estimate.variance.tolist() == [2.0]
    assert estimate.reference_variance.item() == pytest.approx(6.5)
    again = WeightedSum({"a": Fixed(1.0, 2.0), "b": Fixed(3.0, 5.0)}, {"b": -1.0}, aligned=True)
    again.prepare(None)
    again.load_state_dict(made.state_dict())
    assert again.calibrated
    assert again.score(torch.tensor([2.0])).reference_variance.item() == pytest.approx(6.5)


def test_the_unit_of_independent_sources_follows():
    made = WeightedSum({"a": Fixed(1.0, 2.0), "b": Fixed(3.0, 5.0), "c": Fixed(1.0)}, {"b": -2.0})
    made.prepare(None)
    assert made.calibrated
    assert made.score(BATCHES[0]).reference_variance.item() == 3.0 + 4 * 3.0


def test_what_sources_ask_for_is_asked_for_once():
    one, other = Tap(None, "last"), Tap(1, "mean")
    made = WeightedSum(
        {"a": Fixed(1.0, taps=(one,), columns=("x", "y")), "b": Fixed(1.0, taps=(other, one), columns=("y", "z"))}
    )
    made.check()
    assert made.taps == (one, other)
    assert made.columns == ("x", "y", "z")
    assert (made.reads(), made.linear_mean()) == (None, None)


@pytest.mark.parametrize(
    ("sources", "options", "members", "separate"),
    [
        ({"a": Fixed(1.0, 2.0), "b": Fixed(1.0)}, {}, 2, True),
        ({"a": Fixed(1.0, 2.0), "b": Fixed(1.0, 2.0, 3.0)}, {}, 3, False),
        ({"a": Fixed(1.0, 2.0), "b": Fixed(1.0, 2.0)}, {"aligned": True}, 2, True),
        ({"a": Fixed(1.0, 2.0, separate=False), "b": Fixed(1.0)}, {}, 2, False),
        ({"a": Fixed(1.0), "b": Fixed(1.0)}, {}, 1, True),
        # One that only watches lends the sum no variance.
        ({"a": Fixed(1.0, 2.0), "b": Fixed(1.0)}, {"weights": {"a": 0.0}}, 1, True),
    ],
)
def test_members_are_what_objectives_may_use(sources, options, members, separate):
    made = WeightedSum(sources, **options)
    assert (made.num_members, made.separate_members) == (members, separate)
    MeanReward().check_members(members, separate)
    if members < 2:
        with pytest.raises(ValueError, match="VarianceAware needs the variance .* expected at least 2 members, got 1"):
            VarianceAware().check_members(members, separate)
    else:
        VarianceAware().check_members(members, separate)
        if not separate:
            with pytest.raises(ValueError, match="A sum has them with `aligned: true`"):
                CovarianceAware().check_members(members, separate)


def test_a_sum_may_stand_in_a_sum():
    inner = WeightedSum({"a": Fixed(1.0, 2.0), "b": Fixed(1.0)}, {"b": 3.0})
    made = WeightedSum({"inner": inner, "c": Fixed(1.0)}, {"inner": 2.0})
    made.prepare(None)
    estimate = made.score(torch.tensor([1.0]))
    assert estimate.mean.tolist() == [2 * (1.5 + 3) + 1]
    assert estimate.parts["inner"].parts.keys() == {"a", "b"}


def test_a_text_is_a_folder(tiny_model_dir, tmp_path, monkeypatch):
    ppo_helpers.ensemble(tmp_path / "mine", tiny_model_dir)
    monkeypatch.chdir(tmp_path)
    made = WeightedSum({"ensemble": "mine", "text": FunctionReward("reward_functions:length")}, {"text": 0.5})
    assert isinstance(made.summands["ensemble"], EnsembleReward)
    written = whole_paths(plain(made))
    # Found from anywhere, as a checkpoint has to be.
    monkeypatch.chdir("/")
    assert written["init_args"]["sources"]["ensemble"] == str(tmp_path / "mine")
    again = construct(WeightedSum, written["init_args"])
    assert again.num_members == 3
    assert plain(again) == written


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightedSum({}), "sources: expected at least one source, got none"),
        (lambda: WeightedSum({"a": Fixed(1.0)}, {"b": 1.0}), "weights: expected names among a, got 'b'"),
        (lambda: WeightedSum({"a": Fixed(1.0)}, {"a": 0.0}), "weights: expected one that is not 0, got {'a': 0.0}"),
        (lambda: WeightedSum({"a": Fixed(1.0)}, {"a": float("nan")}), "weights.a: expected a finite number, got nan"),
        (
            lambda: WeightedSum({"a b": Fixed(1.0)}),
            "sources: expected names of letters, digits and _ that mean nothing",
        ),
        (lambda: WeightedSum({"mean": Fixed(1.0)}), "that mean nothing else, got 'mean'"),
        (lambda: WeightedSum({"member_1": Fixed(1.0)}), "that mean nothing else, got 'member_1'"),
        (lambda: WeightedSum({"items": Fixed(1.0)}), "that mean nothing else, got 'items'"),
        (
            lambda: WeightedSum({"a": Fixed(1.0, 2.0), "b": Fixed(1.0, 2.0, 3.0)}, aligned=True),
            "aligned: expected sources with equally many separate members (or one), got a: 2, b: 3",
        ),
        (
            lambda: WeightedSum({"a": Fixed(1.0, 2.0), "b": Fixed(1.0, 2.0, separate=False)}, aligned=True),
            "aligned: expected sources with equally many separate members (or one), got a: 2, b: 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_errors_name_the_source():
    made = WeightedSum({"mine": FunctionReward("no_such_module:length")})
    with pytest.raises(ValueError, match="source 'mine': reward function: expected a function that can be imported"):
        made.check()
