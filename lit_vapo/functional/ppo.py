"""The clipped losses of PPO, unreduced, and the statistics that tell whether an update went well.

Losses come back per token, with zeros outside the mask: callers sum them and divide by a *global* token
count, so that one process, gradient accumulation and several processes give the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lit_vapo.functional.kl import MAX_EXPONENT, kl_k3
from lit_vapo.functional.masked import check_mask, check_same_shape, masked_mean, masked_var


class PolicyTerms(NamedTuple):
    """Terms of the policy loss, zeros (False) outside the mask.

    Attributes:
        loss: `(B, T)`, loss of each token, in units of advantage.
        ratio: `(B, T)`, π/π_old of each token.
        clipped: bool `(B, T)`, True where clipping is in force, i.e. the token has no gradient.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


class ValueTerms(NamedTuple):
    """Terms of the value loss, zeros (False) outside the mask.

    Attributes:
        loss: `(B, T)`, half the squared error of each token, in units of reward squared.
        clipped: bool `(B, T)`, True where the clipped prediction has the larger error.
    """

    loss: Tensor
    clipped: Tensor


def _selected(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` in at least float32, zero outside the mask."""
    x = x if x.dtype == torch.float64 else x.float()
    return torch.where(mask, x, torch.zeros_like(x))


def policy_loss_terms(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor, clip_range: float
) -> PolicyTerms:
    """The clipped surrogate of PPO.

        ratio = exp(logprobs - old_logprobs)
        loss = max( -A * ratio, -A * clip(ratio, 1 - ε, 1 + ε) )

    Source: Schulman et al., arXiv 1707.06347, equation 7, with the sign of a loss.

    Args:
        logprobs: `(B, T)`, log-probabilities of the sampled tokens under the policy, in nats.
        old_logprobs: `(B, T)`, the same when they were sampled; pass them without a gradient.
        advantages: `(B, T)`.
        response_mask: bool `(B, T)`, True = counts.
        clip_range: ε in (0, 1).

    Returns:
        PolicyTerms in float32 (float64 stays). The exponent is clamped at 60, so that the loss stays finite.

    Raises:
        ValueError: if shapes differ, the mask is not boolean, or clip_range is out of range.

    Examples:
        >>> new, old = torch.tensor([[2.0, 0.5]]).log(), torch.zeros(1, 2)
        >>> policy_loss_terms(new, old, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), 0.2).loss
        tensor([[-1.2000, -0.5000]])
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    check_mask(logprobs, response_mask, "logprobs")
    if not 0.0 < clip_range < 1.0:
        raise ValueError(f"expected clip_range in (0, 1), got {clip_range}")
    log_ratio = _selected(logprobs, response_mask) - _selected(old_logprobs, response_mask)
    ratio = log_ratio.clamp(max=MAX_EXPONENT).exp()
    advantage = _selected(advantages, response_mask)
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = torch.maximum(unclipped, clipped)
    return PolicyTerms(
        loss,
        torch.where(response_mask, ratio, torch.zeros_like(ratio)),
        response_mask & (clipped > unclipped),
    )


def value_loss_terms(
    values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, clip_range: float | None
) -> ValueTerms:
    """Half the squared error of the value function, optionally clipped about its old prediction.

        loss = 1/2 * max( (V - G)^2, (clip(V, V_old - ε, V_old + ε) - G)^2 )

    Source: the value clipping in the code of OpenAI baselines' PPO2 and of Ziegler et al., arXiv 1909.08593.

    Args:
        values: `(B, T)`, V, in units of reward.
        old_values: `(B, T)`, V_old, the prediction at the time of the rollout.
        returns: `(B, T)`, the targets G.
        response_mask: bool `(B, T)`, True = counts.
        clip_range: ε > 0, in units of reward; None for the plain squared error.

    Returns:
        ValueTerms in float32 (float64 stays).

    Raises:
        ValueError: if shapes differ, the mask is not boolean, or clip_range is not positive.

    Examples:
        >>> v, old, target = torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[2.0]])
        >>> value_loss_terms(v, old, target, torch.tensor([[True]]), 0.5).loss  # 1/2 * (0.5 - 2)^2
        tensor([[1.1250]])
    """
    check_same_shape(values=values, old_values=old_values, returns=returns)
    check_mask(values, response_mask, "values")
    if clip_range is not None and not clip_range > 0:
        raise ValueError(f"expected clip_range > 0 or None, got {clip_range}")
    value, target = _selected(values, response_mask), _selected(returns, response_mask)
    unclipped = 0.5 * (value - target).square()
    if clip_range is None:
        return ValueTerms(unclipped, torch.zeros_like(response_mask))
    old = _selected(old_values, response_mask)
    clipped = 0.5 * (old + (value - old).clamp(-clip_range, clip_range) - target).square()
    return ValueTerms(torch.maximum(unclipped, clipped), clipped > unclipped)


def explained_variance(
    values: Tensor, returns: Tensor, response_mask: Tensor, all_sum: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Share of the variance of the returns that the value function explains, 1 - Var(G - V) / Var(G).

    Args:
        values: `(B, T)`, V.
        returns: `(B, T)`, G.
        response_mask: bool `(B, T)`, True = counts.
        all_sum: sum of a tensor over all processes, for the share over all of them.

    Returns:
        `()`; 1 is perfect, 0 no better than a constant, negative worse; NaN where the returns do not vary.

    Raises:
        ValueError: if shapes differ or the mask is not boolean.
    """
    check_same_shape(values=values, returns=returns)
    variance = masked_var(returns, response_mask, all_sum=all_sum)
    residual = masked_var(returns - values, response_mask, all_sum=all_sum)
    return torch.where(variance > 0, 1.0 - residual / variance, torch.nan)


def approx_kl(old_logprobs: Tensor, logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Mean per-token k3 estimate of KL(π_old || π), (ratio - 1) - log(ratio), from tokens sampled from π_old.

    Args:
        old_logprobs: `(B, T)`, log-probabilities when the tokens were sampled, in nats.
        logprobs: `(B, T)`, the same tokens under the policy now.
        response_mask: bool `(B, T)`, True = counts.

    Returns:
        `()`, in nats per token, >= 0.

    Raises:
        ValueError: if shapes differ or the mask is not boolean.
    """
    check_same_shape(old_logprobs=old_logprobs, logprobs=logprobs)
    check_mask(old_logprobs, response_mask, "old_logprobs")
    return masked_mean(
        kl_k3(_selected(old_logprobs, response_mask) - _selected(logprobs, response_mask)), response_mask
    )
