"""Generalised advantage estimation against a loop, and its limits."""

import pytest
import torch

from lit_vapo.functional import advantages as module
from lit_vapo.functional import gae

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
