"""Advantages against loops, enumeration and their limits."""

import itertools
import math

import pytest
import torch

from lit_vapo.functional import advantages as module
from lit_vapo.functional import gae, group_normalise, leave_one_out, on_every_token

NAN = float("nan")


def loop(rewards, values, mask, gamma, gae_lambda):
    """Equation 16 of arXiv 1506.02438, backwards in time, one row and token after the other."""
    advantages = torch.zeros_like(rewards, dtype=torch.float64)
    for row in range(rewards.shape[0]):
        following, next_value = 0.0, 0.0
        for t in reversed(range(int(mask[row].sum()))):
            delta = rewards[row, t].item() + gamma * next_value - values[row, t].item()
            following = delta + gamma * gae_lambda * following
            advantages[row, t] = following
            next_value = values[row, t].item()
    return advantages


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5, 13, generator=generator)
    mask = torch.arange(13)[None] < torch.tensor([13, 1, 6, 12, 0])[:, None]
    return rewards, values, mask


def test_hand_worked_values():
    # γ = 0.9, λ = 0.5. TD errors: 1 + 0.9 * 2 - 1 = 1.8; 0 + 0.9 * 4 - 2 = 1.6; 3 - 4 = -1.
    # Backwards with 0.45: -1; 1.6 - 0.45 = 1.15; 1.8 + 0.45 * 1.15 = 2.3175.
    out = gae(
        torch.tensor([[1.0, 0.0, 3.0, NAN]]),
        torch.tensor([[1.0, 2.0, 4.0, NAN]]),
        torch.tensor([[True, True, True, False]]),
        gamma=0.9,
        gae_lambda=0.5,
    )
    torch.testing.assert_close(out.advantages, torch.tensor([[2.3175, 1.15, -1.0, 0.0]]))
    torch.testing.assert_close(out.returns, torch.tensor([[3.3175, 3.15, 3.0, 0.0]]))


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("block", [1024, 4, 1])
def test_against_a_loop(batch, monkeypatch, gamma, gae_lambda, block):
    rewards, values, mask = batch
    monkeypatch.setattr(module, "_BLOCK", block)
    out = gae(rewards, values, mask, gamma, gae_lambda)
    expected = loop(rewards, values, mask, gamma, gae_lambda)
    torch.testing.assert_close(out.advantages.double(), expected, rtol=1e-5, atol=1e-6)
    returns = torch.where(mask, expected + values, 0.0)
    torch.testing.assert_close(out.returns.double(), returns, rtol=1e-5, atol=1e-6)
    assert out.advantages.dtype == torch.float32


def test_a_response_longer_than_a_block():
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 1, 2500, generator=generator, dtype=torch.float64)
    mask = torch.ones(1, 2500, dtype=torch.bool)
    out = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.999)
    torch.testing.assert_close(out.advantages, loop(rewards, values, mask, 1.0, 0.999), rtol=1e-9, atol=1e-9)


def test_lambda_zero_gives_td_errors(batch):
    rewards, values, mask = batch
    out = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.0)
    following = torch.where(mask, values, 0.0).roll(-1, dims=1)
    following[:, -1] = 0.0
    torch.testing.assert_close(out.advantages, torch.where(mask, rewards + 0.9 * following - values, 0.0))


def test_lambda_and_gamma_one_give_reward_to_go_less_the_value(batch):
    rewards, values, mask = batch
    out = gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    to_go = torch.where(mask, rewards, 0.0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(out.advantages, torch.where(mask, to_go - values, 0.0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.returns, torch.where(mask, to_go, 0.0), atol=1e-5, rtol=1e-5)


def test_perfect_values_leave_no_advantage():
    rewards = torch.tensor([[1.0, 2.0, 3.0]])
    out = gae(rewards, torch.tensor([[6.0, 5.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(out.advantages, torch.zeros(1, 3))


def test_nan_in_padding_reaches_neither_value_nor_gradient(batch):
    rewards, values, mask = batch
    gradients = []
    for padding in (NAN, 0.0):
        leaves = [torch.where(mask, x, padding).requires_grad_() for x in (rewards, values)]
        out = gae(*leaves, mask)
        assert torch.isfinite(out.advantages).all()
        assert out.advantages[~mask].abs().max() == 0.0
        assert out.returns[~mask].abs().max() == 0.0
        (out.advantages.square().sum() + out.returns.sum()).backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0][0][~mask].abs().max() == 0.0
    assert gradients[0][0][mask].abs().min() > 0.0


def test_bad_arguments_are_refused(batch):
    rewards, values, mask = batch
    gap = torch.tensor([[True, True, True], [True, False, True]])
    with pytest.raises(ValueError, match="without a gap, got a late start or a gap in row 1"):
        gae(torch.zeros(2, 3), torch.zeros(2, 3), gap)
    with pytest.raises(ValueError, match="got a late start or a gap in row 0"):
        gae(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([[False, True, True]]))
    with pytest.raises(ValueError, match=r"expected gae_lambda in \[0, 1\], got 1.5"):
        gae(rewards, values, mask, gae_lambda=1.5)
    with pytest.raises(ValueError, match=r"expected values of shape \(5, 13\), as rewards, got \(5, 12\)"):
        gae(rewards, values[:, :12], mask)
    with pytest.raises(ValueError, match=r"expected rewards of shape \(B, T\), got \(13,\)"):
        gae(rewards[0], values[0], mask[0])


def test_leave_one_out_by_hand():
    # Prompt one: 4 - 2 and 2 - 4. Prompt two: -1 - 5 and 5 + 1.
    out = leave_one_out(torch.tensor([4.0, 2.0, -1.0, 5.0]), 2)
    torch.testing.assert_close(out, torch.tensor([2.0, -2.0, -6.0, 6.0]))


def test_leave_one_out_against_a_loop():
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0))
    out = leave_one_out(rewards, 4)
    for i, reward in enumerate(rewards.tolist()):
        group = range(i // 4 * 4, i // 4 * 4 + 4)
        others = [rewards[j].item() for j in group if j != i]
        assert out[i].item() == pytest.approx(reward - sum(others) / 3, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_leave_one_out_gives_the_exact_policy_gradient_on_average(count):
    # All draws of `count` responses from three, each with its probability: the mean of A_i * grad log p(y_i), which is
    # e_y - p for logits, must be the gradient of the expected reward, p * (r - p·r).
    p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    reward = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64)
    mean = torch.zeros(3, dtype=torch.float64)
    for draw in itertools.product(range(3), repeat=count):
        index = torch.tensor(draw)
        score = torch.eye(3, dtype=torch.float64)[index] - p
        mean += p[index].prod() * (leave_one_out(reward[index], count)[:, None] * score).mean(0)
    torch.testing.assert_close(mean, p * (reward - p @ reward))


def test_group_normalise_by_hand():
    # 1, 3: mean 2, unbiased std √2. 0, 10: mean 5, std √50.
    out = group_normalise(torch.tensor([1.0, 3.0, 0.0, 10.0]), 2, eps=0.5)
    one, two = 1 / (math.sqrt(2) + 0.5), 5 / (math.sqrt(50) + 0.5)
    torch.testing.assert_close(out, torch.tensor([-one, one, -two, two]))


def test_large_rewards_do_not_drown_their_differences():
    rewards = torch.tensor([1e6, 1e6 + 1, 1e6 + 2])
    torch.testing.assert_close(group_normalise(rewards, 3), torch.tensor([-1.0, 0.0, 1.0]), rtol=1e-3, atol=0)
    torch.testing.assert_close(leave_one_out(rewards, 3), torch.tensor([-1.5, 0.0, 1.5]))


@pytest.mark.parametrize("compare", [leave_one_out, group_normalise])
def test_groups_that_are_none_are_refused(compare):
    with pytest.raises(ValueError, match="expected num_responses >= 2, got 1"):
        compare(torch.zeros(4), 1)
    with pytest.raises(ValueError, match="expected a multiple of 3 rewards, n for each prompt, got 4"):
        compare(torch.zeros(4), 3)
    with pytest.raises(ValueError, match=r"expected rewards of shape \(B,\), got \(2, 2\)"):
        compare(torch.zeros(2, 2), 2)


def test_bad_eps_and_bad_masks_are_refused():
    with pytest.raises(ValueError, match="expected eps > 0, got 0"):
        group_normalise(torch.zeros(2), 2, eps=0)
    with pytest.raises(ValueError, match=r"expected x of shape \(3,\), got \(2,\)"):
        on_every_token(torch.zeros(2), torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"dtype torch.bool"):
        on_every_token(torch.zeros(3), torch.ones(3, 4))
