"""The reward of each token: the ensemble's score at the end, and the weighted KL penalty all along."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_vapo.functional.masked import check_mask, check_same_shape


def clip_rewards(rewards: Tensor, limit: float | None) -> Tensor:
    """Clip rewards to [-limit, limit].

    Args:
        rewards: any shape, in units of reward.
        limit: > 0, in the same units; None leaves the rewards alone.

    Returns:
        Same shape.

    Raises:
        ValueError: if limit is not positive.

    Examples:
        >>> clip_rewards(torch.tensor([-7.0, 2.0]), 5.0)
        tensor([-5.,  2.])
    """
    if limit is None:
        return rewards
    if not limit > 0:
        raise ValueError(f"expected limit > 0 or None, got {limit}")
    return rewards.clamp(-limit, limit)


def token_rewards(
    terminal: Tensor,
    log_ratio_tokens: Tensor,
    kl_weight: Tensor,
    kl_coef: float,
    response_mask: Tensor,
    shared_weight: Tensor | None = None,
    kl_tokens: Tensor | None = None,
) -> Tensor:
    """Per-token rewards of the objective E[R] - β * D_w(π || π0).

        r_t = -β * v * log ρ_t + [t is the last response token] * ( R(x, y) - β * (w(x, y) - v) * Σ_s log ρ_s ),
        log ρ_t = log π(a_t) - log π0(a_t)

    The gradient of that objective is exactly E[(R - β * w * log ρ) * grad log π] over whole responses, so the
    penalty belongs here and not in the loss. Source: Banerjee et al., arXiv 2507.15906; w = 1 is Ziegler et al.,
    arXiv 1909.08593, equation 2.

    A row sums to R - β * w * log ρ whatever v is. But w is known only once the response has ended: with v = w, as
    one would write it down first, a token would not hear of the price it puts on the tokens before it, since
    advantages look ahead; the gradient and the optimum would be others wherever w varies. With one v for all rows
    the gradient is right for any v that does not depend on the response. The mean of w is used, of which a response
    is one part in B: it leaves least to the last token, and gives the usual per-token penalty where w does not vary.

    Args:
        terminal: `(B,)`, R, the score of each whole response, in units of reward.
        log_ratio_tokens: `(B, T)`, log π - log π0 of each sampled token, in nats.
        kl_weight: `(B,)`, w >= 0, one weight for each response.
        kl_coef: β >= 0, in units of reward per nat (per unit of weight).
        response_mask: bool `(B, T)`, True = counts.
        shared_weight: `()`, v; None for the mean of `kl_weight`. Processes that share a batch pass its mean.
        kl_tokens: `(B, T)`, KL_t of each token's distribution (`token_kl`), in nats, to stand for log ρ_t in the
            penalty at weight v; the caller adds `own_penalty` to the advantages. None for the sampled log-ratio.

    Returns:
        `(B, T)`, in units of reward, zeros outside the mask.

    Raises:
        ValueError: if shapes do not fit, kl_coef is negative, or a row has no response token to carry the
            score.

    Examples:
        >>> mask = torch.tensor([[True, True, False], [True, False, False]])
        >>> log_ratio = torch.tensor([[1.0, -2.0, 9.0], [0.0, 9.0, 9.0]])
        >>> token_rewards(torch.tensor([5.0, 1.0]), log_ratio, torch.tensor([3.0, 1.0]), 0.1, mask)
        tensor([[-0.2000,  5.5000,  0.0000],
                [ 1.0000,  0.0000,  0.0000]])
    """
    if log_ratio_tokens.ndim != 2:
        raise ValueError(f"expected log_ratio_tokens of shape (B, T), got {tuple(log_ratio_tokens.shape)}")
    check_mask(log_ratio_tokens, response_mask, "log_ratio_tokens")
    if kl_tokens is not None:
        check_same_shape(log_ratio_tokens=log_ratio_tokens, kl_tokens=kl_tokens)
    for name, tensor in (("terminal", terminal), ("kl_weight", kl_weight)):
        if tensor.shape != log_ratio_tokens.shape[:1]:
            raise ValueError(f"expected {name} of shape ({log_ratio_tokens.shape[0]},), got {tuple(tensor.shape)}")
    if not kl_coef >= 0:
        raise ValueError(f"expected kl_coef >= 0, got {kl_coef}")
    empty = ~response_mask.any(dim=1)
    if bool(empty.any()):
        raise ValueError(f"expected a response token in every row, got none in row {int(empty.nonzero()[0])}")
    shared = kl_weight.mean() if shared_weight is None else shared_weight
    log_ratio = torch.where(response_mask, log_ratio_tokens, torch.zeros_like(log_ratio_tokens))
    score = terminal - kl_coef * (kl_weight - shared) * log_ratio.sum(1)
    positions = torch.arange(response_mask.shape[1], device=response_mask.device)
    last = torch.where(response_mask, positions, -1).amax(dim=1, keepdim=True)
    charged = log_ratio if kl_tokens is None else torch.where(response_mask, kl_tokens, torch.zeros_like(kl_tokens))
    return -kl_coef * shared * charged + torch.where(positions == last, score[:, None], 0)


def own_penalty(
    log_ratio_tokens: Tensor, kl_tokens: Tensor, kl_coef: float, response_mask: Tensor, shared_weight: Tensor
) -> Tensor:
    """What a token's own draw cost more than its distribution does: a term of the advantage of this token alone.

        -β * v * ( log ρ_t - KL_t )

    With rewards that charge KL_t (`token_rewards`, where this is derived) it makes the gradient that of the penalty:
    a token hears its own sampled log-ratio, and of later tokens their exact KLs. KL_t is in it so that its mean is 0,
    whatever the tokens before; a baseline could be taken off instead.

    Args:
        log_ratio_tokens: `(B, T)`, log ρ_t = log π - log π0 of each sampled token, in nats.
        kl_tokens: `(B, T)`, KL_t, in nats.
        kl_coef: β >= 0, in units of reward per nat (per unit of weight).
        response_mask: bool `(B, T)`, True = counts.
        shared_weight: `()`, v, as in `token_rewards`.

    Returns:
        `(B, T)`, in units of reward, zeros outside the mask.

    Raises:
        ValueError: if shapes differ, the mask is not boolean, or kl_coef is negative.

    Examples:
        >>> mask = torch.tensor([[True, True]])
        >>> own_penalty(torch.tensor([[1.0, -2.0]]), torch.full((1, 2), 0.5), 0.1, mask, torch.tensor(2.0))
        tensor([[-0.1000,  0.5000]])
    """
    check_same_shape(log_ratio_tokens=log_ratio_tokens, kl_tokens=kl_tokens)
    check_mask(log_ratio_tokens, response_mask, "log_ratio_tokens")
    if not kl_coef >= 0:
        raise ValueError(f"expected kl_coef >= 0, got {kl_coef}")
    surplus = torch.where(response_mask, log_ratio_tokens - kl_tokens, torch.zeros_like(log_ratio_tokens))
    return -kl_coef * shared_weight * surplus
