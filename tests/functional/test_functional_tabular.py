"""The exact theory of one prompt: gradient, optimum, divergence and risks."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from scipy.special import logsumexp

from lit_vapo.functional import bregman_kl, match_kl, objective, optimal_policy, risk_vanilla, risk_variance_aware


def random_case(seed, n=6):
    """Reward, reference and weight over n responses, in float64."""
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(n, generator=generator, dtype=torch.float64)
    ref = torch.randn(n, generator=generator, dtype=torch.float64).softmax(0)
    weight = torch.rand(n, generator=generator, dtype=torch.float64) * 4 + 0.05
    return reward, ref, weight


def test_divergence_hand_worked():
    # π = (1/2, 1/2), π0 = (1/4, 3/4), w = (2, 4).
    # 2 * (log(2)/2 - 1/4) + 4 * (log(2/3)/2 + 1/4) = log 2 + 2 log(2/3) + 1/2.
    policy, ref, weight = torch.tensor([[0.5, 0.5], [0.25, 0.75], [2.0, 4.0]])
    expected = math.log(2) + 2 * math.log(2 / 3) + 0.5
    torch.testing.assert_close(bregman_kl(policy, ref, weight), torch.tensor(expected))
    # J = 1/2 * 1 + 1/2 * 3 - 0.1 * D_w.
    value = objective(policy, torch.tensor([1.0, 3.0]), ref, 0.1, weight)
    torch.testing.assert_close(value, torch.tensor(2 - 0.1 * expected))


def test_divergence_is_zero_only_at_the_reference():
    for seed in range(20):
        _, ref, weight = random_case(seed)
        _, policy, _ = random_case(seed + 100)
        assert bregman_kl(policy, ref, weight) > 0
        assert abs(bregman_kl(ref, ref, weight)) < 1e-15


def test_divergence_at_the_edge_of_the_simplex():
    # 0 log 0 is 0: π = (1, 0) against (1/2, 1/2) is log 2; the other way round it is infinite.
    corner, middle = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    torch.testing.assert_close(bregman_kl(corner, middle), torch.tensor(math.log(2)))
    assert bregman_kl(middle, corner).item() == math.inf
    assert bregman_kl(corner, corner).item() == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_the_objective_is_the_expected_score_times_the_penalised_reward(seed):
    reward, ref, weight = random_case(seed)
    kl_coef = 0.3
    theta = torch.randn(6, generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64)

    def value(logits):
        return objective(logits.softmax(0), reward, ref, kl_coef, weight).item()

    step, finite = 1e-5, []
    for direction in torch.eye(6, dtype=torch.float64):
        finite.append((value(theta + step * direction) - value(theta - step * direction)) / (2 * step))
    policy = theta.softmax(0)
    penalised = reward - kl_coef * weight * (policy / ref).log()
    score = torch.eye(6, dtype=torch.float64) - policy[None, :]  # row y: gradient of log π(y)
    expected = (policy * penalised) @ score
    torch.testing.assert_close(torch.tensor(finite, dtype=torch.float64), expected, rtol=1e-6, atol=1e-8)
    # A weighted k1 term as a loss, E[w log(π/π0)], has another gradient.
    leaf = theta.clone().requires_grad_()
    naive = leaf.softmax(0) @ reward - kl_coef * (leaf.softmax(0) * weight * (leaf.softmax(0) / ref).log()).sum()
    naive.backward()
    assert (leaf.grad - expected).abs().max() > 1e-2


def test_optimum_hand_worked():
    # Choose c = 1, β = 1, w = (1, 2), π0 = (1/2, 1/2) and rewards that give π* = (3/4, 1/4):
    # R = c + w log(π*/π0) = 1 + log(3/2), 1 - 2 log 2.
    reward = torch.tensor([1 + math.log(1.5), 1 - 2 * math.log(2)])
    found = optimal_policy(reward, torch.tensor([0.5, 0.5]), 1.0, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(found, torch.tensor([0.75, 0.25], dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kl_coef", [0.01, 0.5, 20.0])
def test_constant_weight_gives_the_gibbs_policy(kl_coef):
    reward, ref, _ = random_case(0)
    gibbs = (ref.log() + reward / kl_coef).softmax(0)
    torch.testing.assert_close(optimal_policy(reward, ref, kl_coef), gibbs, rtol=1e-9, atol=1e-300)
    # A constant weight only rescales β.
    tripled = optimal_policy(reward, ref, kl_coef / 3, torch.full((6,), 3.0))
    torch.testing.assert_close(tripled, gibbs, rtol=1e-9, atol=1e-300)


def test_large_coefficient_gives_the_reference_and_a_small_one_the_best_response():
    reward, ref, weight = random_case(1)
    torch.testing.assert_close(optimal_policy(reward, ref, 1e9, weight), ref, rtol=1e-6, atol=0)
    greedy = optimal_policy(reward, ref, 1e-12, weight)
    assert greedy[reward.argmax()] > 1 - 1e-9
    assert greedy.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kl_coef", [0.2, 2.0])
def test_optimum_against_brute_force(seed, kl_coef):
    reward, ref, weight = random_case(seed)

    def loss(logits):
        policy = torch.from_numpy(logits).softmax(0)
        return -objective(policy, reward, ref, kl_coef, weight).item()

    best = optimize.minimize(loss, ref.log().numpy(), method="BFGS", options={"gtol": 1e-7})
    found = optimal_policy(reward, ref, kl_coef, weight)
    brute = torch.from_numpy(best.x).softmax(0)
    assert 0.5 * (found - brute).abs().sum() < 1e-4
    assert -best.fun <= objective(found, reward, ref, kl_coef, weight).item() + 1e-12


def test_optimum_satisfies_its_own_equation():
    reward, ref, weight = random_case(2)
    found = optimal_policy(reward, ref, 0.3, weight)
    multiplier = reward - 0.3 * weight * (found / ref).log()  # c(x), the same for every response
    torch.testing.assert_close(multiplier, multiplier[:1].expand(6), rtol=1e-9, atol=1e-9)
    assert found.sum() == pytest.approx(1.0, abs=1e-12)


def test_optimum_survives_large_rewards_and_responses_out_of_reach():
    reward = torch.tensor([1e6, -1e6, 3e6, 0.0])
    found = optimal_policy(reward, torch.tensor([0.5, 0.25, 0.0, 0.25]), 1e-3, torch.tensor([1.0, 2.0, 1.0, 9.0]))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64))


def test_a_response_out_of_reach_costs_no_precision():
    two = optimal_policy(torch.tensor([0.0, -1e-8]), torch.tensor([0.5, 0.5]), 1e-8, torch.tensor([1.0, 2.0]))
    three = optimal_policy(
        torch.tensor([0.0, -1e-8, 1e9]), torch.tensor([0.5, 0.5, 0.0]), 1e-8, torch.tensor([1.0, 2.0, 1.0])
    )
    torch.testing.assert_close(three[:2], two)


def test_a_dear_response_moves_less():
    # Same reward and reference for the first two; the second costs ten times as much.
    reward, ref = torch.tensor([1.0, 1.0, 0.0]), torch.full((3,), 1 / 3)
    found = optimal_policy(reward, ref, 1.0, torch.tensor([1.0, 10.0, 1.0]))
    assert found[0] > found[1] > 1 / 3


RISKS = [
    ([1.0, 0.0, -0.5], [4.0, 0.5, 1.0]),
    ([0.3, 0.1, 0.0, -0.2, 0.5], [0.1, 0.2, 3.0, 0.05, 2.0]),
]


@pytest.mark.parametrize(("true_reward", "sigma"), RISKS)
def test_risks_against_draws_and_matrices(true_reward, sigma):
    r, s = torch.tensor(true_reward, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)
    n, draws = len(r), 400_000
    ones, inverse = np.ones((n, n)), np.diag(1 / s.numpy())
    p = np.eye(n) - ones / n
    m = inverse - inverse @ ones @ inverse / inverse.sum()
    noise = np.random.default_rng(0).standard_normal((draws, n))
    estimates = r.numpy() + noise * np.sqrt(s.numpy())
    risks = []
    for step, risk in ((p, risk_vanilla(r, s)), (m, risk_variance_aware(r, s))):
        drawn = np.mean(estimates @ step @ r.numpy() < 0)
        assert abs(drawn - risk.item()) < 4 * np.sqrt(drawn * (1 - drawn) / draws)
        risks.append(risk.item())
    rr, big = r.numpy(), np.diag(s.numpy())
    expected = [-rr @ p @ rr / np.sqrt(rr @ p @ big @ p @ rr), -np.sqrt(rr @ m @ rr)]
    np.testing.assert_allclose(risks, stats.norm.cdf(expected), rtol=1e-10)
    np.testing.assert_allclose(m @ big @ p, p, atol=1e-12)


def test_risks_hand_worked():
    # R* = (1, -1), Σ = (1, 3): R*'PR* = 2, R*'PΣPR* = 4, so Φ(-1). Two responses leave one direction: equal.
    r, s = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 3.0])
    phi = torch.tensor(0.158655, dtype=torch.float64)
    torch.testing.assert_close(risk_vanilla(r, s), phi, rtol=1e-5, atol=0)
    torch.testing.assert_close(risk_variance_aware(r, s), phi, rtol=1e-5, atol=0)


def test_variance_aware_is_never_riskier_and_equal_for_equal_variances():
    for seed in range(50):
        reward, _, variance = random_case(seed)
        assert risk_variance_aware(reward, variance) <= risk_vanilla(reward, variance) + 1e-15
        flat = torch.full_like(variance, 0.7)
        torch.testing.assert_close(risk_variance_aware(reward, flat), risk_vanilla(reward, flat))
        # A shift of all rewards is no information.
        torch.testing.assert_close(risk_variance_aware(reward + 9, variance), risk_variance_aware(reward, variance))


def test_a_small_optimal_step_from_a_uniform_reference_is_along_m():
    # The risks speak of steps along P R and M R: these are what optimal_policy does for large β and w = σ².
    reward, _, variance = random_case(4)
    uniform = torch.full((6,), 1 / 6, dtype=torch.float64)
    precision = 1 / variance
    along_m = precision * (reward - (precision * reward).sum() / precision.sum())
    for weight, direction in ((variance, along_m), (None, reward - reward.mean())):
        step = optimal_policy(reward, uniform, 1e5, weight) - uniform
        torch.testing.assert_close(step * 6e5, direction, rtol=1e-3, atol=1e-4)


def test_many_prompts_at_once_are_each_by_itself():
    rewards, refs, weights = (torch.stack(x) for x in zip(*map(random_case, range(4)), strict=True))
    kl_coef = torch.tensor([0.1, 0.5, 1.0, 4.0], dtype=torch.float64)
    together = optimal_policy(rewards, refs, kl_coef, weights)
    cases = list(zip(rewards, refs, kl_coef.tolist(), weights, strict=True))
    torch.testing.assert_close(together, torch.stack([optimal_policy(*case) for case in cases]))
    alone = [bregman_kl(policy, ref) for policy, ref in zip(together, refs, strict=True)]
    torch.testing.assert_close(bregman_kl(together, refs), torch.stack(alone))
    values = [objective(p, r, ref, 0.5, w) for p, (r, ref, _, w) in zip(together, cases, strict=True)]
    torch.testing.assert_close(objective(together, rewards, refs, 0.5, weights), torch.stack(values))


def bisected(reward, ref, weight):
    """π* with c between the least and the greatest reward, by a bracketing solver of scipy."""

    def excess(c):
        return logsumexp(np.log(ref) + (reward - c) / weight)

    c = optimize.brentq(excess, reward.min(), reward.max(), xtol=1e-14, rtol=1e-14)
    return ref * np.exp((reward - c) / weight)


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_optimum_against_bisection(spread):
    # At a spread of 4 weights run from about e⁻¹² to e¹²: one response is free and the next one frozen.
    draw = torch.Generator().manual_seed(0)
    rewards = 3 * torch.randn(40, 7, generator=draw, dtype=torch.float64)
    refs = torch.randn(40, 7, generator=draw, dtype=torch.float64).softmax(-1)
    weights = (spread * torch.randn(40, 7, generator=draw, dtype=torch.float64)).exp()
    found = optimal_policy(rewards, refs, 1.0, weights)
    for row, *case in zip(found.numpy(), rewards.numpy(), refs.numpy(), weights.numpy(), strict=True):
        np.testing.assert_allclose(row, bisected(*case), rtol=1e-6, atol=1e-9)


def test_matched_kl_is_met_or_said_to_be_out_of_reach():
    rewards, refs, weights = (torch.stack(x) for x in zip(*map(random_case, range(4)), strict=True))
    policy = match_kl(lambda b: optimal_policy(rewards, refs, b, weights), refs, 0.3)
    torch.testing.assert_close(bregman_kl(policy, refs), torch.full((4,), 0.3, dtype=torch.float64))
    # Nothing is further from (1/2, 1/2) than log 2.
    even = torch.full((2,), 0.5, dtype=torch.float64)
    assert match_kl(lambda b: optimal_policy(torch.tensor([1.0, 0.0]), even, b), even, 0.8).isnan().all()
    near = match_kl(lambda b: optimal_policy(torch.tensor([1.0, 0.0]), even, b), even, 0.5)
    torch.testing.assert_close(bregman_kl(near, even), torch.tensor(0.5).double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_coef": 0.0}, "expected finite kl_coef > 0 and every weight > 0, got 0.0"),
        ({"kl_coef": math.inf}, "expected finite kl_coef > 0 and every weight > 0, got inf"),
        ({"weight": torch.tensor([1.0, 0.0])}, r"every weight > 0, got 0.5 and \[1.0, 0.0\]"),
        ({"ref_probs": torch.tensor([0.5, 0.6])}, "expected ref_probs >= 0 that sum to 1"),
        ({"reward": torch.tensor([0.0, math.nan])}, r"expected reward with finite entries, got \[0.0, nan\]"),
        ({"reward": torch.zeros(())}, r"expected reward of shape \(…, n\) with n >= 1, got \(\)"),
        ({"weight": torch.ones(3)}, r"expected weight of shape \(2,\), as reward, got \(3,\)"),
    ],
)
def test_optimum_refuses_bad_arguments(change, message):
    good = {"reward": torch.tensor([1.0, 0.0]), "ref_probs": torch.tensor([0.5, 0.5]), "kl_coef": 0.5}
    optimal_policy(**good)
    with pytest.raises(ValueError, match=message):
        optimal_policy(**good | change)


@pytest.mark.parametrize("risk", [risk_vanilla, risk_variance_aware])
def test_risks_refuse_bad_arguments(risk):
    with pytest.raises(ValueError, match="expected positive variances in sigma_diag"):
        risk(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="expected a true_reward that varies"):
        risk(torch.tensor([2.0, 2.0]), torch.ones(2))
    with pytest.raises(ValueError, match=r"expected sigma_diag of shape \(2,\), as true_reward, got \(3,\)"):
        risk(torch.tensor([1.0, 0.0]), torch.ones(3))
