"""Per-token rewards with the weighted KL penalty."""

import pytest
import torch

from lit_vapo.functional import clip_rewards, objective, own_penalty, token_rewards

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


class Enumerated:
    """All 2 * 2 * 2 responses of a policy over two tokens, with logits of their own after each of the 7 prefixes."""

    def __init__(self, seed=0, scale=1.0):
        generator = torch.Generator().manual_seed(seed)
        logits, ref = torch.randn(2, 7, 2, generator=generator, dtype=torch.float64)
        self.logits = (ref + scale * (logits - ref)).requires_grad_()
        self.reward, spread = torch.randn(2, 8, generator=generator, dtype=torch.float64)
        self.weight = spread.exp()
        tokens = torch.tensor([[y >> 2 & 1, y >> 1 & 1, y & 1] for y in range(8)])
        prefixes = torch.stack([torch.zeros(8).long(), 1 + tokens[:, 0], 3 + 2 * tokens[:, 0] + tokens[:, 1]], dim=1)
        self.logprobs = self.logits.log_softmax(1)[prefixes, tokens]
        self.ref_logprobs = ref.log_softmax(1)[prefixes, tokens]
        self.policy = self.logprobs.sum(1).exp()
        self.log_ratio = (self.logprobs - self.ref_logprobs).detach()
        p, q = self.logits.detach().log_softmax(1), ref.log_softmax(1)
        self.kl = (p.exp() * (p - q)).sum(1)[prefixes]
        self.mask = torch.ones(8, 3, dtype=torch.bool)

    def exact(self, weight):
        """Gradient of the objective, (7, 2)."""
        value = objective(self.policy, self.reward, self.ref_logprobs.sum(1).exp(), 0.7, weight)
        return torch.autograd.grad(value, self.logits, retain_graph=True)[0]

    def advantages(self, weight, shared, kl, own=True):
        """Rewards to go of each token, (8, 3), with what only the token itself hears."""
        rewards = token_rewards(self.reward, self.log_ratio, weight, 0.7, self.mask, shared, self.kl if kl else None)
        to_go = rewards.flip(1).cumsum(1).flip(1)
        return to_go + own_penalty(self.log_ratio, self.kl, 0.7, self.mask, shared) if kl and own else to_go

    def moments(self, advantages):
        """Mean (7, 2) and total variance () of a response's policy gradient."""
        rows = [torch.autograd.grad(x, self.logits, retain_graph=True)[0] for x in (advantages * self.logprobs).sum(1)]
        each, chance = torch.stack(rows), self.policy.detach()[:, None, None]
        mean = (chance * each).sum(0)
        return mean, (chance * (each - mean).square()).sum()


@pytest.mark.parametrize("shared", [None, 0.0, 2.0])
def test_rewards_to_go_give_the_gradient_of_the_objective_where_the_weight_varies(shared):
    case = Enumerated()
    shared = None if shared is None else torch.tensor(shared, dtype=torch.float64)
    found, _ = case.moments(case.advantages(case.weight, shared, kl=False))
    torch.testing.assert_close(found, case.exact(case.weight), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shared", [0.0, 2.0])
def test_exact_kls_of_later_tokens_and_the_own_ratio_give_the_same_gradient(shared):
    case, shared = Enumerated(), torch.tensor(shared, dtype=torch.float64)
    found, _ = case.moments(case.advantages(case.weight, shared, kl=True))
    torch.testing.assert_close(found, case.exact(case.weight), rtol=1e-10, atol=1e-12)


def test_without_its_own_penalty_a_token_does_not_hear_of_its_own_kl():
    # What is missing is the mean of the gradients of the tokens' own KLs.
    case, one = Enumerated(), torch.tensor(1.0, dtype=torch.float64)
    found, _ = case.moments(case.advantages(torch.ones(8).double(), one, kl=True, own=False))
    missing = (case.policy.detach()[:, None] * case.log_ratio * case.logprobs).sum()
    (missing,) = torch.autograd.grad(missing, case.logits, retain_graph=True)
    assert missing.abs().max() > 0.1
    torch.testing.assert_close(found - 0.7 * missing, case.exact(torch.ones(8).double()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weight", ["one", "varying"])
def test_exact_kls_are_less_noisy(weight):
    # Drawn responses have the gradient of the objective on average; this is how far one is off. Scores are left out:
    # what is compared is the noise of the penalty. docs/ppo.md has these figures.
    ratios = []
    for seed in range(30):
        case = Enumerated(seed, scale=0.5)
        case.reward.zero_()
        weights = torch.ones_like(case.weight) if weight == "one" else case.weight
        shared = (case.policy.detach() * weights).sum()
        sampled, exact = (case.moments(case.advantages(weights, shared, kl))[1] for kl in (False, True))
        ratios.append(float(exact / sampled))
    assert sum(ratios) / 30 == pytest.approx({"one": 0.54, "varying": 0.82}[weight], abs=0.005)
    # Less noise of each term is no promise for their sum, where the rest of the weight is in it too.
    assert (max(ratios) < 1) == (weight == "one")


def test_rewards_with_exact_kls_by_hand():
    # β = 0.5, mean w = 3: -1.5 * (0.2, 0.4, 0.1) and -1.5 * 1. At the end of row 0, w = 2: 10 - 0.5 * (2 - 3) * 2 = 11;
    # of row 1, w = 4: -1 - 0.5 * (4 - 3) * 3 = -2.5. Own: -1.5 * (1 - 0.2, -1 - 0.4, 2 - 0.1) and -1.5 * (3 - 1).
    log_ratio = torch.tensor([[1.0, -1.0, 2.0], [3.0, NAN, NAN]])
    kl = torch.tensor([[0.2, 0.4, 0.1], [1.0, NAN, NAN]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = token_rewards(torch.tensor([10.0, -1.0]), log_ratio, torch.tensor([2.0, 4.0]), 0.5, mask, kl_tokens=kl)
    torch.testing.assert_close(rewards, torch.tensor([[-0.3, -0.6, 10.85], [-4.0, 0.0, 0.0]]))
    own = own_penalty(log_ratio, kl, 0.5, mask, torch.tensor(3.0))
    torch.testing.assert_close(own, torch.tensor([[-1.2, 2.1, -2.85], [-3.0, 0.0, 0.0]]))


def test_a_token_that_has_its_mean_ratio_has_no_penalty_of_its_own():
    kl, mask = torch.rand(2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3, dtype=torch.bool)
    assert own_penalty(kl, kl, 0.5, mask, torch.tensor(2.0)).abs().max() == 0
    terminal, weight = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
    sampled, exact = (token_rewards(terminal, kl, weight, 0.5, mask, kl_tokens=x) for x in (None, kl))
    assert torch.equal(sampled, exact)


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
    wrong = r"expected kl_tokens of shape \(2, 3\), as log_ratio_tokens, got \(2, 1\)"
    with pytest.raises(ValueError, match=wrong):
        token_rewards(**good, kl_tokens=torch.zeros(2, 1))
    ratio, mask, weight = good["log_ratio_tokens"], good["response_mask"], torch.tensor(1.0)
    with pytest.raises(ValueError, match=wrong):
        own_penalty(ratio, torch.zeros(2, 1), 0.1, mask, weight)
    with pytest.raises(ValueError, match=r"expected kl_coef >= 0, got -0\.1"):
        own_penalty(ratio, ratio, -0.1, mask, weight)
