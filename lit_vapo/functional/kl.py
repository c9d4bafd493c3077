"""Estimators of the KL divergence of the policy from its reference, plain and weighted.

All take the log ratio log(π/π0) of samples of the policy, tokens or whole sequences. Source of k1, k2, k3:
Schulman, "Approximating KL divergence" (2020). His ratio r is π0/π here. The weighted divergence is the
Bregman divergence of arXiv 2507.15906,

    D_w(π || π0) = Σ_y w(y) * ( π(y) log(π(y)/π0(y)) - π(y) + π0(y) ).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_vapo.functional.masked import check_mask, check_same_shape, masked_sum

# exp(60) = 1e26 is past any meaning, and still finite in float32 when many such samples are summed.
MAX_EXPONENT = 60.0


def sequence_log_ratio(logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Log ratio of whole responses, log(π(y)/π0(y)): the sum over the response of the tokens' log ratios.

    Args:
        logprobs: `(B, T)`, log-probabilities under the policy, in nats.
        ref_logprobs: `(B, T)`, the same tokens under the reference.
        response_mask: bool `(B, T)`, True = counts.

    Returns:
        `(B,)`, in nats; 0 for a row without response tokens.

    Raises:
        ValueError: if shapes differ or the mask is not boolean.

    Examples:
        >>> mask = torch.tensor([[True, True, False]])
        >>> sequence_log_ratio(torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-2.0, -2.5, -1.0]]), mask)
        tensor([1.5000])
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    check_mask(logprobs, response_mask, "logprobs")
    return masked_sum(logprobs - ref_logprobs, response_mask, dim=1)


def kl_k1(log_ratio: Tensor) -> Tensor:
    """The naive estimator log(π/π0): unbiased, of high variance, below zero for some samples.

    Args:
        log_ratio: any shape, log(π/π0) of samples of π, in nats.

    Returns:
        Same shape, in nats.
    """
    return log_ratio


def kl_k2(log_ratio: Tensor) -> Tensor:
    """Half the square of the log ratio: of low variance, never negative, biased far from the reference.

    Args:
        log_ratio: any shape, log(π/π0) of samples of π, in nats.

    Returns:
        Same shape, in nats.
    """
    return 0.5 * log_ratio.square()


def kl_k3(log_ratio: Tensor) -> Tensor:
    """Schulman's estimator π0/π - 1 + log(π/π0): unbiased where π covers π0, and never negative.

    Args:
        log_ratio: any shape, log(π/π0) of samples of π, in nats.

    Returns:
        Same shape, in nats. The exponent is clamped at 60, so that one impossible sample cannot make the mean
        infinite.

    Examples:
        >>> kl_k3(torch.tensor([0.0, 1.0]))  # exp(-1) - 1 + 1 = 0.3679
        tensor([0.0000, 0.3679])
    """
    return torch.expm1((-log_ratio).clamp(max=MAX_EXPONENT)) + log_ratio


def weighted_k3(log_ratio: Tensor, weight: Tensor) -> Tensor:
    """Weighted k3, w * (π0/π - 1 + log(π/π0)), whose mean under π is D_w(π || π0) exactly.

    The weight is a property of the whole response, so pass sequence log ratios, not those of tokens. This is
    for logging: the penalty itself belongs in the reward (`token_rewards`), since as a loss it would have
    another gradient.

    Args:
        log_ratio: `(B,)`, log(π/π0) of responses sampled from π, in nats.
        weight: `(B,)`, w >= 0, in the units of the weight.

    Returns:
        `(B,)`, each >= 0.

    Raises:
        ValueError: if the shapes differ.

    Examples:
        >>> weighted_k3(torch.tensor([1.0]), torch.tensor([2.0]))
        tensor([0.7358])
    """
    check_same_shape(log_ratio=log_ratio, weight=weight)
    return weight * kl_k3(log_ratio)


def adapt_kl_coef(kl_coef: Tensor, kl: Tensor, target: float, gain: float) -> Tensor:
    """One step of proportional control of β in log space: dearer above the target, cheaper below.

        e = clip(KL / target - 1, -0.2, 0.2),    β <- β * (1 + gain * e)

    Source: Ziegler et al., arXiv 1909.08593, §2.2, where the gain is 0.1.

    Args:
        kl_coef: `()`, β >= 0.
        kl: `()`, the KL now, in nats.
        target: > 0, in nats.
        gain: in (0, 1], the share of the error that one step acts on.

    Returns:
        `()`, the next β.

    Raises:
        ValueError: if target or gain is out of range.

    Examples:
        >>> adapt_kl_coef(torch.tensor(0.5), torch.tensor(4.4), 4.0, 0.1)  # 10% too far: up by 1%
        tensor(0.5050)
    """
    if not target > 0:
        raise ValueError(f"expected target > 0, got {target}")
    if not 0 < gain <= 1:
        raise ValueError(f"expected gain in (0, 1], got {gain}")
    return kl_coef * (1 + gain * (kl / target - 1).clamp(-0.2, 0.2))
