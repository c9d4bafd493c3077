"""The covariance-weighted norm of a policy's move: identity, gradient, optimum, gains per prompt."""

import math

import pytest
import torch
from scipy import optimize

from lit_vapo.functional import covariance, covariance_optimal_policy, member_weights, optimal_policy, prompt_gains


def random_case(seed, n=6, count=4):
    """Members, reference and policy over n responses, in float64."""
    draw = torch.Generator().manual_seed(seed)
    members = torch.randn(n, count, generator=draw, dtype=torch.float64)
    ref, policy = torch.randn(2, n, generator=draw, dtype=torch.float64).softmax(1)
    return members, ref, policy


@pytest.mark.parametrize("seed", range(3))
def test_the_norm_of_the_move_is_the_variance_of_the_gains(seed):
    members, ref, policy = random_case(seed)
    move, n = policy - ref, len(ref)
    norm = 0.0
    for y in range(n):  # the sum over all pairs of responses, as defined
        for z in range(n):
            centred = [(r[y] - members[y].mean()) * (r[z] - members[z].mean()) for r in members.T]
            norm += move[y] * move[z] * sum(centred) / (members.shape[1] - 1)
    torch.testing.assert_close(norm, (move @ members).var(correction=1))


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_weighted_members_are_the_gradient_of_the_penalised_gain(seed, bound):
    members, ref, _ = random_case(seed)
    theta = torch.randn(6, generator=torch.Generator().manual_seed(seed + 9), dtype=torch.float64)

    def value(logits):
        gain = (logits.softmax(0) - ref) @ members
        return (gain.mean() - 0.7 * (gain.std() if bound else gain.var())).item()

    step = 1e-5
    finite = [(value(theta + step * e) - value(theta - step * e)) / (2 * step) for e in torch.eye(6).double()]
    policy = theta.softmax(0)
    reward = members @ member_weights((policy - ref) @ members, 0.7, bound)
    expected = policy * (reward - policy @ reward)  # E_π[reward · ∇ log π] of a softmax
    torch.testing.assert_close(torch.tensor(finite, dtype=torch.float64), expected, rtol=1e-6, atol=1e-9)


def test_weights_by_hand():
    # Gains 0, 1, 5: mean 2, deviations -2, -1, 3; variance (4 + 1 + 9)/2 = 7.
    gain = torch.tensor([0.0, 1.0, 5.0])
    # variance, λ = 0.1: 1/3 - 2·0.1/2·deviation
    torch.testing.assert_close(member_weights(gain, 0.1), 1 / 3 - torch.tensor([-0.2, -0.1, 0.3]))
    # bound, λ = 1: 1/3 - deviation/(2√7); with noise 2 under the root: deviation/(2·3)
    deviation = torch.tensor([-2.0, -1.0, 3.0])
    torch.testing.assert_close(member_weights(gain, 1.0, bound=True), 1 / 3 - deviation / (2 * 7**0.5))
    torch.testing.assert_close(member_weights(gain, 1.0, True, noise=2.0), 1 / 3 - deviation / 6)


@pytest.mark.parametrize("bound", [False, True])
def test_weights_sum_to_one_and_know_no_shift_and_no_order(bound):
    gain = random_case(3)[0]
    weights = member_weights(gain, 2.0, bound)
    torch.testing.assert_close(weights.sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(member_weights(gain + 5, 2.0, bound), weights)
    torch.testing.assert_close(member_weights(gain[:, [2, 0, 3, 1]], 2.0, bound), weights[:, [2, 0, 3, 1]])


@pytest.mark.parametrize("bound", [False, True])
def test_equal_gains_give_equal_weights(bound):
    weights = member_weights(torch.full((2, 4), 0.3, requires_grad=True), 3.0, bound)
    torch.testing.assert_close(weights, torch.full((2, 4), 0.25))
    weights.sum().backward()


def test_a_bound_never_costs_more_than_the_members_spread():
    members, _, _ = random_case(4)
    for gain in random_case(5)[0] * torch.logspace(-12, 3, 6, dtype=torch.float64)[:, None]:
        excess = members @ member_weights(gain, 2.0, bound=True) - members.mean(1)
        assert (excess.abs() <= 2.0 * members.std(1) * (1 + 1e-9)).all()


def test_noise_makes_the_bound_fade_where_gains_are_equal_up_to_noise():
    gain = torch.tensor([1e-6, 0.0])
    assert member_weights(gain, 1.0, bound=True)[0] < 0
    torch.testing.assert_close(member_weights(gain, 1.0, bound=True, noise=1.0), torch.tensor([0.5, 0.5]))


def test_gains_per_prompt_by_hand():
    # One prompt, three responses with u = π0/π = 1/2, 1/4, 1/8 and one member's rewards 8, 4, 2. For the first
    # response: others' mean 3, reference (4/4 + 2/8)/(3/8) = 10/3, share 3/16; with 10 over the batch:
    # 3/16·(-1/3) + 13/16·10.
    # Second: mean 5, reference (8/2 + 2/8)/(5/8) = 6.8, share 5/16. Third: mean 6, (4 + 1)/(3/4) = 20/3, share 3/8.
    log_ratio = torch.tensor([2.0, 4.0, 8.0]).log()
    found = prompt_gains(torch.tensor([[8.0], [4.0], [2.0]]), log_ratio, 3, torch.tensor([10.0]))
    expected = [[-1 / 16 + 130 / 16], [5 / 16 * -1.8 + 110 / 16], [3 / 8 * (-2 / 3) + 50 / 8]]
    torch.testing.assert_close(found.gain, torch.tensor(expected))
    torch.testing.assert_close(found.share, torch.tensor([3 / 16, 5 / 16, 3 / 8]))


def test_gains_per_prompt_know_no_offset_of_a_prompt_and_not_the_response_itself():
    draw = torch.Generator().manual_seed(0)
    members, log_ratio = torch.randn(8, 3, generator=draw), torch.randn(8, generator=draw) + 0.5
    gain = torch.tensor([0.1, 0.2, 0.3])
    before = prompt_gains(members, log_ratio, 4, gain)
    offsets = torch.randn(2, 3, generator=draw).repeat_interleave(4, 0)
    torch.testing.assert_close(prompt_gains(members + offsets, log_ratio, 4, gain), before, rtol=1e-4, atol=1e-5)
    members[5], log_ratio[5] = 100.0, -3.0
    after = prompt_gains(members, log_ratio, 4, gain)
    torch.testing.assert_close(after.gain[:6:5], before.gain[:6:5])  # another prompt's response, and itself
    assert (after.gain[4] - before.gain[4]).abs().min() > 1


def test_gains_per_prompt_at_the_reference_and_far_from_it():
    members = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    gain = torch.tensor([0.1, 0.2, 0.3])
    near, far = (prompt_gains(members, torch.full((6,), x), 3, gain) for x in (0.0, 50.0))
    torch.testing.assert_close(near.gain, torch.zeros(6, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(far.gain, gain.expand(6, 3))


def test_many_responses_to_a_prompt_tell_its_gain():
    members, ref, policy = random_case(1, n=5, count=3)
    n = 600
    drawn = torch.multinomial(policy, n, replacement=True, generator=torch.Generator().manual_seed(0))
    found = prompt_gains(members[drawn], (policy / ref).log()[drawn], n, torch.full((3,), 99.0).double())
    exact = (policy - ref) @ members
    # Only where the responses' mean weight falls below 1 does the batch's gain (99) enter.
    own = (found.gain[0] - (1 - found.share[0]) * 99) / found.share[0]
    torch.testing.assert_close(own, exact, atol=0.15, rtol=0)


def value(policy, case, kl_coef, penalty, bound):
    members, ref, _ = case
    gain = (policy - ref) @ members
    spread = gain.std(-1) if bound else gain.var(-1)
    return gain.mean(-1) - penalty * spread - kl_coef * (policy * (policy / ref).log()).sum(-1)


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize(("penalty", "kl_coef"), [(0.3, 0.2), (0.2, 0.5)])
def test_optimum_against_brute_force(bound, penalty, kl_coef):
    case = random_case(2)

    def loss(logits):
        return -value(torch.from_numpy(logits).softmax(0), case, kl_coef, penalty, bound).item()

    best = optimize.minimize(loss, case[1].log().numpy() + 0.1, method="BFGS", options={"gtol": 1e-7})
    found = covariance_optimal_policy(*case[:2], kl_coef, penalty, bound)
    assert loss(found.log().numpy()) <= best.fun + 1e-12
    torch.testing.assert_close(found, torch.from_numpy(best.x).softmax(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_no_step_from_the_optimum_gains_where_the_bound_has_a_kink(seed):
    # The objective is concave: no better policy nearby means none anywhere. At a dear bound the optimum has Std = 0.
    case = random_case(seed)
    found = covariance_optimal_policy(*case[:2], 0.5, 3.0, bound=True)
    draw = torch.Generator().manual_seed(0)
    steps = torch.randn(400, 6, generator=draw, dtype=torch.float64) * torch.logspace(-6, 0, 400).double()[:, None]
    nearby = (found.log() + steps).softmax(1)
    assert (value(nearby, case, 0.5, 3.0, True) <= value(found, case, 0.5, 3.0, True) + 1e-12).all()


@pytest.mark.parametrize("bound", [False, True])
def test_optimum_is_the_gibbs_policy_of_its_own_weighted_members(bound):
    members = torch.stack([random_case(seed)[0] for seed in range(3)])
    ref = torch.stack([random_case(seed)[1] for seed in range(3)])
    kl_coef = torch.tensor([0.4, 0.8, 2.0], dtype=torch.float64)
    found = covariance_optimal_policy(members, ref, kl_coef, 0.2, bound)
    gain = ((found - ref)[..., None] * members).sum(1)
    reward = (members * member_weights(gain, 0.2, bound)[:, None]).sum(-1)
    torch.testing.assert_close(found, optimal_policy(reward, ref, kl_coef), rtol=1e-6, atol=1e-9)
    again = covariance_optimal_policy(members, ref, kl_coef, 0.2, bound, start=optimal_policy(reward, ref, 5.0))
    torch.testing.assert_close(again, found, rtol=1e-6, atol=1e-9)


def test_optimum_of_equal_members_is_that_of_their_mean():
    members, ref, _ = random_case(0)
    equal = members[:, :1].expand(-1, 3)
    for bound in (False, True):
        found = covariance_optimal_policy(equal, ref, 0.5, 3.0, bound)
        torch.testing.assert_close(found, optimal_policy(members[:, 0], ref, 0.5))


def test_a_dear_bound_leaves_no_disagreement_about_the_gain():
    members, ref, _ = random_case(6)
    found = covariance_optimal_policy(members, ref, 1.0, 100.0, bound=True)
    gain = (found - ref) @ members
    assert gain.std() < 1e-6
    assert gain.mean() > 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: member_weights(torch.ones(3, 1), 1.0), r"expected gain of shape \(…, K\) with K >= 2, got \(3, 1\)"),
        (
            lambda: prompt_gains(torch.ones(4, 2), torch.ones(4), 1, torch.ones(2)),
            "expected at least 2 responses to each prompt, got 1",
        ),
        (
            lambda: prompt_gains(torch.ones(4, 2), torch.ones(4), 3, torch.ones(2)),
            "expected 3 responses to each prompt, got 4 rows",
        ),
        (lambda: prompt_gains(torch.ones(4, 2), torch.ones(3), 2, torch.ones(2)), "expected first_member of shape"),
        (
            lambda: covariance_optimal_policy(torch.ones(4, 2), torch.ones(3), 1.0, 1.0),
            r"expected ref_probs of shape \(4,\), got \(3,\)",
        ),
        (
            lambda: covariance_optimal_policy(torch.ones(4, 2), torch.full((4,), 0.25), 1.0, 0.0),
            "expected penalty > 0 and kl_coef > 0, got 0.0 and 1.0",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_bound_is_solved_in_few_steps(monkeypatch):
    # A shift of all members has no curvature: taken as a direction it fills the ball and the search wanders.
    calls = []
    target = covariance._newton_target
    monkeypatch.setattr(covariance, "_newton_target", lambda *args: calls.append(1) or target(*args))
    covariance_optimal_policy(*random_case(6, n=40, count=5)[:2], 0.5, 1.0, bound=True)
    assert len(calls) < 20


def test_no_policy_gains_by_disagreement_alone():
    # Two members of opposite minds: the mean is flat, and the penalty keeps the policy where it is.
    members = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    ref = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert math.isclose(covariance_optimal_policy(members, ref, 0.01, 1.0)[0], 0.5, abs_tol=1e-9)
