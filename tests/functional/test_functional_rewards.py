"""Per-token rewards with the weighted KL penalty."""

import pytest
import torch

from lit_vapo.functional import clip_rewards, objective, token_rewards

NAN = float("nan")


def test_hand_worked_values():
    # β = 0.5, mean w = 3: -1.5 * (1, -1, 2) and -1.5 * 3. At the end of row 0, w = 2: 10 - 0.5 * (2 - 3) * 2 = 11;
    # of row 1, w = 4: -1 - 0.5 * (4 - 3) * 3 = -2.5.
    rewards = token_rewards(
        torch.tensor([10.0, -1.0]),
        torch.tensor([[1.0, -1.0, 2.0], [3.0, NAN, NAN]]),
        torch.tensor([2.0, 4.0]),
        0.5,
        torch.tensor([[True, True, True], [True, False, False]]),
    )
    torch.testing.assert_close(rewards, torch.tensor([[-1.5, 1.5, 8.0], [-7.0, 0.0, 0.0]]))


def test_a_constant_weight_is_the_usual_penalty_of_each_token():
    log_ratio = torch.tensor([[1.0, -2.0], [0.5, NAN]])
    mask = torch.tensor([[True, True], [True, False]])
    rewards = token_rewards(torch.tensor([1.0, 2.0]), log_ratio, torch.full((2,), 3.0), 0.1, mask)
    # -0.3 * (1, -2) + (0, 1); -0.3 * 0.5 + 2.
    torch.testing.assert_close(rewards, torch.tensor([[-0.3, 1.6], [1.85, 0.0]]))


@pytest.mark.parametrize("shared", [None, 0.0, 2.0])
def test_rewards_to_go_give_the_gradient_of_the_objective_where_the_weight_varies(shared):
    # All 2 * 2 * 2 responses of a policy over two tokens, with logits of their own after each of the 7 prefixes.
    generator = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(2, 7, 2, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    reward, spread = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    weight = spread.exp()
    tokens = torch.tensor([[y >> 2 & 1, y >> 1 & 1, y & 1] for y in range(8)])
    prefixes = torch.stack([torch.zeros(8).long(), 1 + tokens[:, 0], 3 + 2 * tokens[:, 0] + tokens[:, 1]], dim=1)
    logprobs = logits.log_softmax(1)[prefixes, tokens]
    ref_logprobs = ref.log_softmax(1)[prefixes, tokens]
    policy = logprobs.sum(1).exp()
    (exact,) = torch.autograd.grad(
        objective(policy, reward, ref_logprobs.sum(1).exp(), 0.7, weight), logits, retain_graph=True
    )
    shared = None if shared is None else torch.tensor(shared, dtype=torch.float64)
    log_ratio = (logprobs - ref_logprobs).detach()
    rewards = token_rewards(reward, log_ratio, weight, 0.7, torch.ones(8, 3, dtype=torch.bool), shared)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    (found,) = torch.autograd.grad((policy.detach()[:, None] * to_go * logprobs).sum(), logits)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


def test_a_row_sums_to_the_score_less_the_penalty():
    generator = torch.Generator().manual_seed(0)
    terminal, weight = torch.randn(2, 5, generator=generator)
    log_ratio = torch.randn(5, 6, generator=generator)
    mask = torch.arange(6)[None] < torch.tensor([1, 2, 4, 6, 3])[:, None]
    rewards = token_rewards(terminal, log_ratio, weight.abs(), 0.3, mask)
    expected = [
        terminal[b].item() - 0.3 * weight[b].abs().item() * sum(log_ratio[b, t].item() for t in range(6) if mask[b, t])
        for b in range(5)
    ]
    torch.testing.assert_close(rewards.sum(1), torch.tensor(expected))
    assert rewards[~mask].abs().max() == 0.0


def test_the_score_lands_on_the_last_true_position_even_after_a_gap():
    mask = torch.tensor([[False, True, False, True, False]])
    rewards = token_rewards(torch.tensor([1.0]), torch.zeros(1, 5), torch.ones(1), 0.1, mask)
    assert rewards.tolist() == [[0.0, 0.0, 0.0, 1.0, 0.0]]


def test_without_a_coefficient_only_the_score_is_left():
    mask = torch.tensor([[True, True]])
    rewards = token_rewards(torch.tensor([3.0]), torch.tensor([[5.0, 6.0]]), torch.tensor([9.0]), 0.0, mask)
    assert rewards.tolist() == [[0.0, 3.0]]


def test_nan_in_padding_reaches_neither_value_nor_gradient():
    mask = torch.tensor([[True, True, False]])
    log_ratio = torch.tensor([[1.0, 2.0, NAN]], requires_grad=True)
    terminal, weight = torch.tensor([1.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    rewards = token_rewards(terminal, log_ratio, weight, 0.5, mask)
    rewards.sum().backward()
    assert torch.isfinite(rewards).all()
    assert log_ratio.grad.tolist() == [[-1.0, -1.0, 0.0]]
    assert terminal.grad.tolist() == [1.0]
    assert weight.grad.tolist() == [-1.5]


def test_clipping():
    rewards = torch.tensor([-3.0, 0.5, 3.0])
    assert clip_rewards(rewards, 2.0).tolist() == [-2.0, 0.5, 2.0]
    assert clip_rewards(rewards, None) is rewards
    with pytest.raises(ValueError, match="expected limit > 0 or None, got 0"):
        clip_rewards(rewards, 0.0)


def test_bad_arguments_are_refused():
    good = {
        "terminal": torch.zeros(2),
        "log_ratio_tokens": torch.zeros(2, 3),
        "kl_weight": torch.ones(2),
        "kl_coef": 0.1,
        "response_mask": torch.tensor([[True, False, False], [True, True, False]]),
    }
    token_rewards(**good)
    with pytest.raises(ValueError, match="expected a response token in every row, got none in row 1"):
        token_rewards(**good | {"response_mask": torch.tensor([[True] * 3, [False] * 3])})
    with pytest.raises(ValueError, match=r"expected terminal of shape \(2,\), got \(3,\)"):
        token_rewards(**good | {"terminal": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"expected kl_weight of shape \(2,\), got \(2, 3\)"):
        token_rewards(**good | {"kl_weight": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"expected kl_coef >= 0, got -0\.1"):
        token_rewards(**good | {"kl_coef": -0.1})
    with pytest.raises(ValueError, match=r"expected log_ratio_tokens of shape \(B, T\), got \(3,\)"):
        token_rewards(**good | {"log_ratio_tokens": torch.zeros(3)})
