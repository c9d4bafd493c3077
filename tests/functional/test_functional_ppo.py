"""The clipped losses, their statistics, and PPO on a bandit whose optimum is known."""

import math

import pytest
import torch

from lit_vapo.functional import (
    approx_kl,
    explained_variance,
    gae,
    optimal_policy,
    policy_loss_terms,
    token_rewards,
    value_loss_terms,
)

NAN = float("nan")
ALL = torch.ones(1, 4, dtype=torch.bool)


def test_policy_loss_hand_worked():
    # Ratios 2, 2, 0.5, 0.5 with ε = 0.2 and advantages 1, -1, 1, -1:
    # max(-2, -1.2) clipped; max(2, 1.2); max(-0.5, -0.8); max(0.5, 0.8) clipped.
    terms = policy_loss_terms(
        torch.tensor([[2.0, 2.0, 0.5, 0.5]]).log(),
        torch.zeros(1, 4),
        torch.tensor([[1.0, -1.0, 1.0, -1.0]]),
        ALL,
        clip_range=0.2,
    )
    torch.testing.assert_close(terms.loss, torch.tensor([[-1.2, 2.0, -0.5, 0.8]]))
    torch.testing.assert_close(terms.ratio, torch.tensor([[2.0, 2.0, 0.5, 0.5]]))
    assert terms.clipped.tolist() == [[True, False, False, True]]


def test_policy_gradient_is_that_of_the_surrogate_and_none_where_clipped():
    # d(-A r)/d logprob = -A r: -(-1)*2 and -(1)*0.5; clipped tokens have none.
    logprobs = torch.tensor([[2.0, 2.0, 0.5, 0.5]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    policy_loss_terms(logprobs, torch.zeros(1, 4), advantages, ALL, 0.2).loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 2.0, -0.5, 0.0]]))


def test_first_update_has_ratio_one_and_the_plain_policy_gradient():
    logprobs = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantages = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 4, dtype=torch.bool)
    terms = policy_loss_terms(logprobs, logprobs.detach(), advantages, mask, 0.2)
    terms.loss.sum().backward()
    assert (terms.ratio == 1.0).all()
    assert not terms.clipped.any()
    torch.testing.assert_close(logprobs.grad, -advantages)


def test_an_exploding_ratio_stays_finite():
    logprobs = torch.tensor([[500.0, 500.0, 500.0, -500.0]], requires_grad=True)
    terms = policy_loss_terms(logprobs, torch.zeros(1, 4), torch.tensor([[1.0, -1.0, 0.0, 1.0]]), ALL, 0.2)
    terms.loss.sum().backward()
    assert torch.isfinite(terms.loss).all()
    assert torch.isfinite(logprobs.grad).all()


def test_value_loss_hand_worked():
    # V = 1, V_old = 0, ε = 0.2: V clips to 0.2. Against 2: 0.5 * max(1, 3.24). Against 0: 0.5 * max(1, 0.04).
    # V = 0.1 is in reach: 0.5 * (0.1 - 2)^2 either way. V = -1 clips to -0.2; against -2: 0.5 * max(1, 3.24).
    values = torch.tensor([[1.0, 1.0, 0.1, -1.0]])
    returns = torch.tensor([[2.0, 0.0, 2.0, -2.0]])
    terms = value_loss_terms(values, torch.zeros(1, 4), returns, ALL, 0.2)
    torch.testing.assert_close(terms.loss, torch.tensor([[1.62, 0.5, 1.805, 1.62]]))
    assert terms.clipped.tolist() == [[True, False, False, True]]
    plain = value_loss_terms(values, torch.zeros(1, 4), returns, ALL, None)
    torch.testing.assert_close(plain.loss, torch.tensor([[0.5, 0.5, 1.805, 0.5]]))
    assert not plain.clipped.any()


def test_explained_variance_hand_worked():
    # Returns 0, 2 (population variance 1); residuals 0, 1 (variance 1/4): 3/4. Perfect 1, a constant 0.
    mask = torch.tensor([[True, True, False]])
    returns = torch.tensor([[0.0, 2.0, NAN]])
    torch.testing.assert_close(explained_variance(torch.tensor([[0.0, 1.0, NAN]]), returns, mask), torch.tensor(0.75))
    assert explained_variance(returns, returns, mask).item() == 1.0
    assert explained_variance(torch.full((1, 3), 7.0), returns, mask).item() == 0.0
    assert explained_variance(-returns, returns, mask).item() == -3.0
    assert explained_variance(returns, torch.full((1, 3), 7.0), mask).isnan()


def test_approx_kl_hand_worked_and_exact_by_enumeration():
    # Ratios 2 and 1/2: 1 - log 2 and -1/2 + log 2, mean 1/4.
    mask = torch.tensor([[True, True, False]])
    new = torch.tensor([[math.log(2.0), -math.log(2.0), NAN]])
    torch.testing.assert_close(approx_kl(torch.zeros(1, 3), new, mask), torch.tensor(0.25))
    # Every action appears as often as the old policy draws it, so the mean is KL(old || new).
    old, new = torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.5])
    drawn = torch.tensor([[0, 1, 1, 1]])
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    torch.testing.assert_close(approx_kl(old.log()[drawn], new.log()[drawn], ALL), torch.tensor(expected))
    assert approx_kl(new.log()[drawn], new.log()[drawn], ALL).item() == 0.0


MASK = torch.tensor([[True, True, False], [True, False, False]])
CASES = {
    "policy_loss_terms": lambda x, y, z: policy_loss_terms(x, y, z, MASK, 0.2).loss,
    "value_loss_terms": lambda x, y, z: value_loss_terms(x, y, z, MASK, 0.2).loss,
    "value_loss_terms_plain": lambda x, y, z: value_loss_terms(x, y, z, MASK, None).loss,
    "explained_variance": lambda x, y, z: explained_variance(x, y, MASK),
    "approx_kl": lambda x, y, z: approx_kl(x, y, MASK),
}


@pytest.mark.parametrize("function", CASES.values(), ids=CASES.keys())
def test_nan_in_padding_reaches_neither_value_nor_gradient(function):
    inputs = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0)) * 0.1
    gradients = []
    for padding in (NAN, 0.0):
        leaf, *others = (torch.where(MASK, x, padding) for x in inputs)
        value = function(leaf.requires_grad_(), *others)
        assert torch.isfinite(value).all()
        if value.ndim:
            assert value[~MASK].abs().max() == 0.0
        value.sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0][~MASK].abs().max() == 0.0
    assert gradients[0][MASK].abs().max() > 0.0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_ratio_is_zero_and_not_clipped_outside_the_mask():
    new = torch.tensor([[1.0, NAN, 1.0], [1.0, 1.0, 1.0]])
    terms = policy_loss_terms(new, torch.zeros(2, 3), torch.ones(2, 3), MASK & new.isfinite(), 0.2)
    assert terms.ratio[0, 1:].tolist() == [0.0, 0.0]
    assert terms.clipped.tolist() == [[True, False, False], [True, False, False]]


def test_half_precision_gives_float32_losses():
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert policy_loss_terms(x, x, x, MASK, 0.2).loss.dtype == torch.float32
    assert value_loss_terms(x, x, x, MASK, 0.2).loss.dtype == torch.float32


def test_bad_arguments_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"expected clip_range in \(0, 1\), got 0.0"):
        policy_loss_terms(x, x, x, MASK, 0.0)
    with pytest.raises(ValueError, match=r"expected clip_range > 0 or None, got -0\.2"):
        value_loss_terms(x, x, x, MASK, -0.2)
    with pytest.raises(ValueError, match=r"expected advantages of shape \(2, 3\), as logprobs, got \(2, 1\)"):
        policy_loss_terms(x, x, x[:, :1], MASK, 0.2)
    with pytest.raises(ValueError, match=r"expected a mask of dtype torch.bool"):
        approx_kl(x, x, MASK.long())


REWARD = torch.tensor([1.0, 0.6, 0.0, -0.5, 0.8, 0.2], dtype=torch.float64)
REF = torch.tensor([0.05, 0.15, 0.30, 0.20, 0.10, 0.20], dtype=torch.float64)
VARYING = torch.tensor([4.0, 0.3, 0.5, 1.0, 2.0, 0.2], dtype=torch.float64)
KL_COEF = 0.4


def ppo_on_a_bandit(weight, iterations=150, epochs=4):
    """PPO with exact expectations: each action is a row, its loss weighted by the policy that drew it."""
    logits = REF.log().clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=1.0)
    mask = torch.ones(6, 1, dtype=torch.bool)
    for _ in range(iterations):
        old = logits.detach().log_softmax(0)
        rewards = token_rewards(REWARD, (old - REF.log())[:, None], weight, KL_COEF, mask)
        baseline = (old.exp() * rewards[:, 0]).sum().expand(6, 1)
        advantages = gae(rewards, baseline, mask).advantages
        for _ in range(epochs):
            optimizer.zero_grad()
            terms = policy_loss_terms(logits.log_softmax(0)[:, None], old[:, None], advantages, mask, 0.2)
            (old.exp() * terms.loss[:, 0]).sum().backward()
            optimizer.step()
    return logits.detach().softmax(0)


@pytest.mark.parametrize("weight", [torch.ones_like(REF), VARYING], ids=["constant", "varying"])
def test_ppo_on_a_bandit_finds_the_optimal_policy(weight):
    found = ppo_on_a_bandit(weight)
    optimum = optimal_policy(REWARD, REF, KL_COEF, weight)
    assert 0.5 * (found - optimum).abs().sum() < 0.02
    # The other weight's optimum and the start are far away, so this is no accident.
    other = optimal_policy(REWARD, REF, KL_COEF, VARYING if weight is not VARYING else None)
    assert 0.5 * (optimum - other).abs().sum() > 0.1
    assert 0.5 * (optimum - REF).abs().sum() > 0.1


def test_ppo_on_a_bandit_from_samples():
    generator = torch.Generator().manual_seed(0)
    logits = REF.log().clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=1.0)
    steps, tail = 400, []
    for step in range(steps):
        old = logits.detach().log_softmax(0)
        actions = torch.multinomial(old.exp(), 512, replacement=True, generator=generator)
        mask = torch.ones(512, 1, dtype=torch.bool)
        ratio = (old - REF.log())[actions][:, None]
        rewards = token_rewards(REWARD[actions], ratio, VARYING[actions], KL_COEF, mask)
        advantages = rewards - rewards.mean()
        for _ in range(2):
            optimizer.zero_grad()
            new = logits.log_softmax(0)[actions][:, None]
            policy_loss_terms(new, old[actions][:, None], advantages, mask, 0.2).loss.mean().backward()
            optimizer.step()
        if step >= steps // 2:
            tail.append(logits.detach().softmax(0))
    optimum = optimal_policy(REWARD, REF, KL_COEF, VARYING)
    assert 0.5 * (torch.stack(tail).mean(0) - optimum).abs().sum() < 0.02
