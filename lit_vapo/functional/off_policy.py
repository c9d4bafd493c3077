"""Learning from responses that another computation of the policy has drawn: how far it is, and what that asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lit_vapo.functional.kl import MAX_EXPONENT, kl_k3
from lit_vapo.functional.masked import check_mask, check_same_shape, masked_mean


class SamplerGap(NamedTuple):
    """How far a sampler μ is from the learner π, which computes the same policy.

    Attributes:
        kl: (), KL(μ‖π) in nats per token.
        ratio_max: (), largest π/μ of a token.
    """

    kl: Tensor
    ratio_max: Tensor


def _log_ratio(logprobs: Tensor, sampler_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Log π/μ in at least float32, zero outside the mask."""
    check_same_shape(logprobs=logprobs, sampler_logprobs=sampler_logprobs)
    check_mask(logprobs, response_mask, "logprobs")
    difference = logprobs.to(torch.promote_types(logprobs.dtype, torch.float32)) - sampler_logprobs
    return torch.where(response_mask, difference, torch.zeros_like(difference))


def importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, response_mask: Tensor, cap: float) -> Tensor:
    """Truncated importance weights of tokens that a sampler drew.

        w = min( π(a) / μ(a), cap )

    With w as a factor of each token's loss, the gradient is that of tokens drawn from π, as far as no weight is
    truncated; truncation bounds its variance at the price of a bias (Ionides, 2008). What came before a token is not
    weighted, so states stay the sampler's.

    Source: truncated importance sampling between an inference engine and a learner, Yao et al., "Your efficient RL
    framework secretly brings you off-policy RL training", 2025.

    Args:
        logprobs: `(B, T)`, log-probabilities of the tokens under the learner at the time of the rollout, in nats.
        sampler_logprobs: `(B, T)`, the same under the sampler.
        response_mask: bool `(B, T)`, True = counts.
        cap: largest weight, > 0.

    Returns:
        `(B, T)`, without a gradient; 1 outside the mask.

    Raises:
        ValueError: if shapes differ, the mask is not boolean, or the cap is not positive.

    Examples:
        >>> learner, sampler = torch.tensor([[0.3, 0.9]]).log(), torch.tensor([[0.6, 0.3]]).log()
        >>> importance_weights(learner, sampler, torch.ones(1, 2, dtype=torch.bool), 2.0)
        tensor([[0.5000, 2.0000]])
    """
    if not cap > 0:
        raise ValueError(f"expected cap > 0, got {cap}")
    ratio = _log_ratio(logprobs.detach(), sampler_logprobs.detach(), response_mask).clamp(max=MAX_EXPONENT).exp()
    return ratio.clamp(max=cap)


def sampler_gap(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    response_mask: Tensor,
    all_rows: Callable[[Tensor], Tensor] = lambda x: x,
) -> SamplerGap:
    """How far the sampler of some tokens is from the learner.

        KL(μ‖π) ≈ (1/N) Σ ( π/μ - 1 - log π/μ )      (k3, on tokens drawn from μ)

    Args:
        logprobs: `(B, T)`, log-probabilities of the tokens under the learner, in nats.
        sampler_logprobs: `(B, T)`, the same under the sampler.
        response_mask: bool `(B, T)`, True = counts.
        all_rows: gives what all processes have, one row each, for a vector of this one's.

    Raises:
        ValueError: if shapes differ or the mask is not boolean.

    Examples:
        >>> learner, sampler = torch.tensor([[0.3]]).log(), torch.tensor([[0.6]]).log()
        >>> sampler_gap(learner, sampler, torch.tensor([[True]])).kl  # 0.5 - 1 - log 0.5
        tensor(0.1931)
    """
    log_ratio = _log_ratio(logprobs, sampler_logprobs, response_mask)
    kl, tokens = masked_mean(kl_k3(-log_ratio), response_mask), response_mask.sum()
    largest = log_ratio.masked_fill(~response_mask, -torch.inf).max()
    own = torch.stack([kl * tokens, tokens.to(kl), largest.clamp(max=MAX_EXPONENT).exp()])
    total, count, ratio = all_rows(own[None]).unbind(1)
    return SamplerGap(total.sum() / count.sum(), ratio.max())
