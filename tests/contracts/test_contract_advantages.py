"""Every estimator of the advantage passes this suite; a new file under lit_vapo/advantages/ is tested unasked."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from helpers import concrete_subclasses

import lit_vapo.advantages
from lit_vapo.advantages.base import AdvantageEstimator, GroupBaseline, WholeResponses
from lit_vapo.advantages.gae import Gae
from lit_vapo.advantages.gdpo import Gdpo
from lit_vapo.advantages.grpo import Grpo
from lit_vapo.advantages.rloo import Rloo
from lit_vapo.advantages.rvpo import Rvpo
from lit_vapo.advantages.signal_to_noise import SignalToNoise
from lit_vapo.functional import ensemble_estimate, token_rewards
from lit_vapo.stages.ppo.experience import compute_advantages
from lit_vapo.types import RewardEstimate

ESTIMATORS = concrete_subclasses(lit_vapo.advantages, AdvantageEstimator)
GROUPS = [kind for kind in ESTIMATORS if issubclass(kind, WholeResponses)]
N = 3
MASK = torch.arange(7)[None] < torch.tensor([7, 1, 4, 6, 2, 5])[:, None]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alone(x):
    return x


def told(score, rows=slice(None)):
    """What a sum of two rewards would have said of responses with these scores: four members, two named parts."""
    # They differ less about a response than responses differ: there is something to learn from.
    members = score[:, None] + 0.2 * draw(len(score), 4, seed=5)
    found = ensemble_estimate(members + (score - members.mean(1))[:, None])
    parts = {"own": score + draw(len(score), seed=6), "other": draw(len(score), seed=6) / 2}
    chosen = {name: RewardEstimate(part[rows], torch.zeros_like(part[rows]), None) for name, part in parts.items()}
    whole = RewardEstimate(*(x[rows] for x in found[:3]))
    return whole._replace(parts=chosen, weights={"own": 1.0, "other": -2.0, "logged": 0.0})


def times(found, factor):
    """The same in another unit."""
    members = None if found.members is None else factor * found.members
    parts = {name: times(part, factor) for name, part in (found.parts or {}).items()}
    return found._replace(mean=factor * found.mean, variance=factor**2 * found.variance, members=members, parts=parts)


def estimate(kind, score=None, padding=0.0, kl_weight=None, rows=slice(None), all_sum=alone):
    """Advantages of six responses, three to each of two prompts."""
    score = draw(6, seed=1) if score is None else score
    kl_weight = torch.ones(6) if kl_weight is None else kl_weight
    rewards = token_rewards(score, draw(6, 7, seed=2), kl_weight, 0.1, MASK)
    values = draw(6, 7, seed=3)
    rewards, values = (torch.where(MASK, x, padding)[rows] for x in (rewards, values))
    return kind()(rewards, values if kind.needs_critic else None, MASK[rows], N, all_sum, told(score, rows))


def test_all_are_discovered():
    assert {Gae, Rloo, Grpo, SignalToNoise, Rvpo, Gdpo} <= set(ESTIMATORS)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_shapes_and_masks(kind):
    out = estimate(kind)
    assert out.advantages.shape == (6, 7)
    assert out.advantages.dtype == torch.float32
    assert out.advantages[~MASK].abs().max() == 0
    assert out.advantages[MASK].abs().min() > 0
    assert (out.returns is not None) == kind.needs_critic


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_padding_never_leaks(kind):
    for padding in (float("nan"), 1e9):
        torch.testing.assert_close(estimate(kind, padding=padding), estimate(kind))


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_prompts_may_be_permuted(kind):
    order = [3, 4, 5, 0, 1, 2]
    out, again = estimate(kind), estimate(kind, rows=order)
    torch.testing.assert_close(out.advantages[order], again.advantages)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_two_processes_estimate_what_one_does(kind):
    whole, halves = estimate(kind).advantages, (slice(0, 3), slice(3, 6))
    sums = []
    for rows in halves:
        seen = []
        estimate(kind, rows=rows, all_sum=lambda x, seen=seen: seen.append(x) or x)
        sums.append(seen)
    for rows in halves:
        totals = iter([a + b for a, b in zip(*sums, strict=True)])
        part = estimate(kind, rows=rows, all_sum=lambda x, totals=totals: next(totals))
        torch.testing.assert_close(part.advantages, whole[rows])


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_a_higher_score_never_lowers_its_own_advantage(kind):
    score = draw(6, seed=1)
    before = estimate(kind, score).advantages[0, 6]
    score[0] += 1.0
    assert estimate(kind, score).advantages[0, 6] > before


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_the_weighted_penalty_takes_part(kind):
    weight = torch.tensor([1.0, 1.0, 5.0, 1.0, 1.0, 1.0])
    assert not torch.allclose(estimate(kind, kl_weight=weight).advantages[2], estimate(kind).advantages[2])


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_settings_can_be_read_back(kind):
    # Checkpoints write them by these names.
    names = set(inspect.signature(kind.__init__).parameters) - {"self", "args", "kwargs"}
    assert all(hasattr(kind(), name) for name in names)


@pytest.mark.parametrize("kind", GROUPS)
def test_a_shift_of_a_prompt_s_scores_changes_nothing(kind):
    shift = torch.tensor([5.0, 5.0, 5.0, -2.0, -2.0, -2.0])
    one, two = estimate(kind), estimate(kind, draw(6, seed=1) + shift)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", GROUPS)
def test_equal_rewards_have_no_advantage(kind):
    # The same reward of each response, however many tokens share it.
    same = torch.tensor([0.7] * 3 + [-4.0] * 3)
    rewards = torch.where(MASK, same[:, None] / MASK.sum(1, keepdim=True), 0.0)
    said = RewardEstimate(same, torch.linspace(0.1, 0.6, 6), same[:, None].expand(-1, 4))
    said = said._replace(parts={"one": said, "other": said}, weights={"one": 2.0, "other": -1.0})
    out = kind()(rewards, None, MASK, N, alone, said)
    assert out.advantages.abs().max() < 0.01  # rounding of the sums, 1e-7, is divided by ε = 1e-4 at worst


@pytest.mark.parametrize("kind", GROUPS)
def test_every_token_has_its_response_s_advantage(kind):
    out = estimate(kind).advantages
    for row, mask in zip(out, MASK, strict=True):
        assert (row[mask] == row[0]).all()


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_too_few_responses_are_refused(kind):
    kind().check_responses(kind.min_responses)
    if kind.min_responses > 1:
        message = f"model.sampling.num_responses: expected at least 2, since {kind.__name__} compares .* got 1"
        with pytest.raises(ValueError, match=message):
            kind().check_responses(1)
        with pytest.raises(ValueError, match=message):
            kind()(torch.zeros(6, 7), None, MASK, 1, alone)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_without_an_estimate_of_the_reward_it_is_the_same_or_refuses(kind):
    rewards, values = torch.where(MASK, draw(6, 7, seed=2), 0.0), draw(6, 7, seed=3)
    args = (rewards, values if kind.needs_critic else None, MASK, N, alone)
    with_it = kind()(*args, estimate=told(draw(6, seed=1)))
    assert torch.isfinite(with_it.advantages).all()
    try:
        without = kind()(*args)
    except ValueError as error:
        assert str(error) == f"{kind.__name__}: expected the estimate of the source of rewards, got None"  # noqa: PT017
    else:
        assert issubclass(kind, GroupBaseline) or kind.needs_critic
        torch.testing.assert_close(with_it, without)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_a_source_is_checked_before_anything_is_loaded(kind):
    kind().check_rewards(4, True, ("one", "other"))
    single = RewardEstimate(draw(6, seed=1), torch.zeros(6), draw(6, 1, seed=1))
    rewards, values = torch.where(MASK, draw(6, 7, seed=2), 0.0), draw(6, 7, seed=3)
    try:
        kind().check_rewards(1, True, ())
    except ValueError as error:
        assert str(error).startswith("model.advantage: ")  # noqa: PT017
        assert kind.__name__ in str(error)  # noqa: PT017
    else:
        out = kind()(rewards, values if kind.needs_critic else None, MASK, N, alone, single)
        assert torch.isfinite(out.advantages).all()


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_scale_is_what_a_unit_of_reward_is(kind):
    # In units of reward, advantages double where rewards and values do, whatever the estimator makes of them.
    rewards, values = torch.where(MASK, draw(6, 7, seed=2), 0.0), draw(6, 7, seed=3)
    unscaled = []
    for factor in (1.0, 2.0):
        of_critic, said = factor * values if kind.needs_critic else None, times(told(draw(6, seed=1)), factor)
        out = kind()(factor * rewards, of_critic, MASK, N, alone, said)
        unscaled.append(out.advantages if out.scale is None else out.advantages / out.scale)
    # ε stays what it is, which shows where responses hardly differ.
    torch.testing.assert_close(unscaled[1].double(), 2 * unscaled[0].double(), rtol=3e-3, atol=1e-5)


def rollout_of(log_ratio, token_kl=None, values=None, estimate=None):
    """What `compute_advantages` looks at."""
    return SimpleNamespace(
        rows=None,
        response_mask=MASK,
        reward=draw(6, seed=1),
        kl_weight=draw(6, seed=8).exp(),
        num_responses=N,
        estimate=estimate,
        logprobs=log_ratio,
        ref_logprobs=torch.zeros(6, 7),
        values=values,
        value_states=None,
        sampler_logprobs=None,
        token_kl=token_kl,
    )


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_a_draw_that_cost_more_than_its_distribution_counts_against_its_token_alone(kind):
    log_ratio, kl = draw(6, 7, seed=2), draw(6, 7, seed=6).abs()
    values = draw(6, 7, seed=3) if kind.needs_critic else None
    dearer = log_ratio.clone()
    dearer[2, 1] += 0.5
    # With a weight that varies, the rest of it would be charged at the end.
    even = {"kl_weight": torch.ones(6)}
    said = told(draw(6, seed=1))
    rollouts = [SimpleNamespace(**vars(rollout_of(x, kl, values, said)) | even) for x in (log_ratio, dearer)]
    before, after = (compute_advantages(rollout, 0.1, kind(), alone) for rollout in rollouts)
    rewards = token_rewards(rollouts[0].reward, log_ratio, torch.ones(6), 0.1, MASK, kl_tokens=kl)
    scale = kind()(rewards, values, MASK, N, alone, said).scale
    expected = torch.zeros(6, 7)
    expected[2, 1] = -0.1 * 0.5
    expected = expected if scale is None else (expected * scale).float()
    torch.testing.assert_close(after.advantages - before.advantages, expected, rtol=1e-4, atol=1e-6)
    # The critic learns of exact KLs only.
    assert (after.returns is None and before.returns is None) or torch.equal(after.returns, before.returns)


def test_exact_kls_by_hand():
    # One prompt, two responses; w = 1, β = 0.1. KLs 0.2 + 0.4 and 0.1: R = 1 - 0.06 and 2 - 0.01, which differ by 1.05.
    # Own: -0.1 * (1 - 0.2, 0.1 - 0.4) and -0.1 * (0.6 - 0.1).
    rollout = rollout_of(torch.tensor([[1.0, 0.1], [0.6, 9.0]]), torch.tensor([[0.2, 0.4], [0.1, 9.0]]))
    rollout.response_mask = torch.tensor([[True, True], [True, False]])
    rollout.ref_logprobs, rollout.num_responses = torch.zeros(2, 2), 2
    rollout.reward, rollout.kl_weight = torch.tensor([1.0, 2.0]), torch.ones(2)
    found = compute_advantages(rollout, 0.1, Rloo(), alone).advantages
    torch.testing.assert_close(found, torch.tensor([[-1.05 - 0.08, -1.05 + 0.03], [1.05 - 0.05, 0.0]]))


def test_an_estimator_may_weigh_by_the_variance():
    class Careful(Rloo):
        def __call__(self, rewards, values, response_mask, num_responses, all_sum, estimate=None):
            out = super().__call__(rewards, values, response_mask, num_responses, all_sum)
            scale = 1 / (1 + estimate.variance)[:, None]
            return out._replace(advantages=out.advantages * scale, scale=scale)

    said = RewardEstimate(torch.zeros(6), torch.tensor([0.0, 1.0, 3.0, 0.0, 1.0, 3.0]), None)
    for token_kl in (None, draw(6, 7, seed=6).abs()):
        rollout = rollout_of(draw(6, 7, seed=2), token_kl, estimate=said)
        careful, plain = (compute_advantages(rollout, 0.1, kind(), alone).advantages for kind in (Careful, Rloo))
        torch.testing.assert_close(careful, plain / torch.tensor([1.0, 2.0, 4.0, 1.0, 2.0, 4.0])[:, None])


def test_rloo_by_hand():
    # Two responses to a prompt: rewards of tokens 1, 2 → 3, and 5 → 5; each against the other.
    rewards = torch.tensor([[1.0, 2.0], [5.0, float("nan")]])
    mask = torch.tensor([[True, True], [True, False]])
    out = Rloo()(rewards, None, mask, 2, alone)
    torch.testing.assert_close(out.advantages, torch.tensor([[-2.0, -2.0], [2.0, 0.0]]))


def test_gae_whitens_if_asked():
    raw = Gae(whiten=False)
    rewards, values = draw(6, 7, seed=4), draw(6, 7, seed=5)
    plain = raw(rewards, values, MASK, 1, alone)
    whitened = Gae()(rewards, values, MASK, 1, alone)
    chosen = plain.advantages[MASK].double()
    expected = (chosen - chosen.mean()) / chosen.std()
    torch.testing.assert_close(whitened.advantages[MASK].double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(whitened.returns, plain.returns)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gae(gamma=1.5), "model.advantage.gamma: expected a number from 0 to 1, got 1.5"),
        (lambda: Gae(gae_lambda=-0.1), "model.advantage.gae_lambda: expected a number from 0 to 1, got -0.1"),
        (lambda: Grpo(eps=0.0), "model.advantage.eps: expected a number above 0, got 0.0"),
        (lambda: Gae()(torch.zeros(6, 7), None, MASK, 1, alone), "Gae: expected the values of a critic, got None"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
