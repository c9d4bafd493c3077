"""KL estimators, plain and weighted."""

import math

import pytest
import torch

from lit_vapo.functional import adapt_kl_coef, bregman_kl, kl_k1, kl_k2, kl_k3, sequence_log_ratio, weighted_k3


def random_case(seed, n=9):
    """A policy, a reference and a weight over n responses, in float64."""
    generator = torch.Generator().manual_seed(seed)
    policy, ref = torch.randn(2, n, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    return policy, ref, torch.rand(n, generator=generator, dtype=torch.float64) * 5


def test_hand_worked_values():
    # Log ratio log 2: k1 = 0.6931, k2 = 0.2402, k3 = 1/2 - 1 + log 2 = 0.1931; weighted by 3, 0.5794.
    ratio = torch.tensor([math.log(2.0)])
    torch.testing.assert_close(kl_k1(ratio), torch.tensor([0.693147]))
    torch.testing.assert_close(kl_k2(ratio), torch.tensor([0.240227]))
    torch.testing.assert_close(kl_k3(ratio), torch.tensor([0.193147]))
    torch.testing.assert_close(weighted_k3(ratio, torch.tensor([3.0])), torch.tensor([0.579442]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_weighted_k3_has_the_mean_d_w_exactly(seed):
    policy, ref, weight = random_case(seed)
    mean = (policy * weighted_k3((policy / ref).log(), weight)).sum()
    brute = sum(
        w * (p * math.log(p / q) - p + q)
        for p, q, w in zip(policy.tolist(), ref.tolist(), weight.tolist(), strict=True)
    )
    assert abs(mean.item() - brute) < 1e-10
    assert abs(bregman_kl(policy, ref, weight).item() - brute) < 1e-10


def test_weighted_k3_sampled():
    policy, ref, weight = random_case(0)
    drawn = torch.multinomial(policy, 200_000, replacement=True, generator=torch.Generator().manual_seed(1))
    samples = weighted_k3((policy / ref).log(), weight)[drawn]
    assert samples.min() >= 0
    error = samples.std() / len(drawn) ** 0.5
    assert abs(samples.mean() - bregman_kl(policy, ref, weight)) < 4 * error


def test_the_naive_weighted_kl_can_be_negative():
    # π = (1/4, 3/4), π0 = (1/2, 1/2), w = (4, 0): naive 4/4 * log(1/2) = -0.69; D_w = -0.69 - 1 + 2 = 0.31.
    policy, ref = torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.5])
    weight = torch.tensor([4.0, 0.0])
    log_ratio = (policy / ref).log()
    torch.testing.assert_close((policy * weight * kl_k1(log_ratio)).sum(), torch.tensor(-math.log(2.0)))
    torch.testing.assert_close((policy * weighted_k3(log_ratio, weight)).sum(), torch.tensor(1 - math.log(2.0)))


def test_without_weights_k1_and_k3_have_the_same_mean():
    policy, ref, weight = random_case(3)
    log_ratio = (policy / ref).log()
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Categorical(probs=policy), torch.distributions.Categorical(probs=ref)
    )
    torch.testing.assert_close((policy * kl_k1(log_ratio)).sum(), divergence)
    torch.testing.assert_close((policy * kl_k3(log_ratio)).sum(), divergence)
    torch.testing.assert_close((policy * weighted_k3(log_ratio, torch.ones_like(weight))).sum(), divergence)


def test_near_the_reference_k3_is_k2():
    # k3 = x^2/2 - x^3/6 + …; computed with exp(x) - 1 the float32 rounding would drown it.
    x = torch.tensor([1e-3, -1e-3])
    torch.testing.assert_close(kl_k3(x), kl_k2(x), rtol=1e-3, atol=0)
    assert kl_k3(torch.zeros(1)).item() == 0.0


def test_huge_log_ratios_stay_finite_with_their_gradient():
    x = torch.tensor([-1e4, 1e4], requires_grad=True)
    value = kl_k3(x)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(x.grad).all()
    # At 1e4 the exponential is gone: x - 1.
    assert value[1].item() == 1e4 - 1


def test_sequence_log_ratio_against_a_loop_with_nan_in_padding():
    generator = torch.Generator().manual_seed(0)
    logprobs, ref = torch.randn(2, 3, 4, generator=generator)
    lengths = [4, 2, 0]
    mask = torch.arange(4)[None] < torch.tensor(lengths)[:, None]
    expected = [sum((logprobs[b, t] - ref[b, t]).item() for t in range(n)) for b, n in enumerate(lengths)]
    padded = torch.where(mask, logprobs, torch.nan).requires_grad_()
    ratio = sequence_log_ratio(padded, torch.where(mask, ref, torch.nan), mask)
    torch.testing.assert_close(ratio, torch.tensor(expected))
    ratio.sum().backward()
    torch.testing.assert_close(padded.grad, mask.float())


def test_bad_shapes_are_refused():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"expected ref_logprobs of shape \(2, 3\), as logprobs, got \(2, 2\)"):
        sequence_log_ratio(torch.zeros(2, 3), torch.zeros(2, 2), mask)
    with pytest.raises(ValueError, match=r"expected a mask of shape \(2, 3\), as logprobs, got \(2, 2\)"):
        sequence_log_ratio(torch.zeros(2, 3), torch.zeros(2, 3), mask[:, :2])
    with pytest.raises(ValueError, match=r"expected weight of shape \(2,\), as log_ratio, got \(1,\)"):
        weighted_k3(torch.zeros(2), torch.zeros(1))


def test_control_of_the_coefficient_by_hand():
    # KL 1.1 of a target of 1: error 0.1. KL 5: error limited to 0.2. KL 0: to -0.2.
    for kl, gain, expected in ((1.1, 0.1, 0.505), (5.0, 0.5, 0.55), (0.0, 1.0, 0.4), (1.0, 1.0, 0.5)):
        out = adapt_kl_coef(torch.tensor(0.5), torch.tensor(kl), 1.0, gain)
        torch.testing.assert_close(out, torch.tensor(expected))
    with pytest.raises(ValueError, match="expected target > 0, got 0"):
        adapt_kl_coef(torch.tensor(0.5), torch.tensor(1.0), 0, 0.1)
    with pytest.raises(ValueError, match=r"expected gain in \(0, 1\], got 1.5"):
        adapt_kl_coef(torch.tensor(0.5), torch.tensor(1.0), 1.0, 1.5)
