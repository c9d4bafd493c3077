"""Generalised advantage estimation over masked responses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_vapo.functional.masked import accumulation_dtype, check_mask, check_same_shape

_BLOCK = 1024


class Advantages(NamedTuple):
    """Advantages and the targets of the value function.

    Attributes:
        advantages: `(B, T)`, in units of reward, zeros outside the mask, not whitened.
        returns: `(B, T)`, advantages + values, zeros outside the mask.
    """

    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float = 1.0, gae_lambda: float = 0.95
) -> Advantages:
    """Generalised advantage estimates.

        δ_t = r_t + γ * V_{t+1} - V_t,    A_t = Σ_{s >= t} (γλ)^(s-t) * δ_s

    with V = 0 after the last response token. λ = 0 gives the TD errors, λ = 1 the discounted reward to go
    minus the value. Source: Schulman et al., arXiv 1506.02438, equation 16. Nothing is whitened here; the
    caller does that (`masked_whiten`). Computed in float64.

    Args:
        rewards: `(B, T)`, in units of reward.
        values: `(B, T)`, the value before each token, in units of reward.
        response_mask: bool `(B, T)`, True = counts; each row is a run of True from t = 0, possibly empty.
        gamma: discount γ in [0, 1].
        gae_lambda: λ in [0, 1].

    Returns:
        Advantages and returns, both `(B, T)` in the dtype of `values`.

    Raises:
        ValueError: if shapes differ, a coefficient is out of range, or a response has a gap or does not start
            at t = 0.

    Example:
        >>> mask = torch.tensor([[True, True, False]])
        >>> rewards, values = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.6, 9.0]])
        >>> gae(rewards, values, mask, gae_lambda=0.5).advantages
        tensor([[0.3000, 0.4000, 0.0000]])
    """
    if rewards.ndim != 2:
        raise ValueError(f"expected rewards of shape (B, T), got {tuple(rewards.shape)}")
    check_same_shape(rewards=rewards, values=values)
    check_mask(rewards, response_mask, "rewards")
    for name, coefficient in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0.0 <= coefficient <= 1.0:
            raise ValueError(f"expected {name} in [0, 1], got {coefficient}")
    gaps = (response_mask[:, 1:] & ~response_mask[:, :-1]).any(dim=1)
    if bool(gaps.any()):
        raise ValueError(
            "expected responses that run from t = 0 without a gap, "
            f"got a late start or a gap in row {int(gaps.nonzero()[0])}"
        )
    dtype = accumulation_dtype(rewards.device)
    zeros = torch.zeros_like(rewards, dtype=dtype)
    reward = torch.where(response_mask, rewards.to(dtype), zeros)
    value = torch.where(response_mask, values.to(dtype), zeros)
    next_value = torch.cat([value[:, 1:], zeros[:, :1]], dim=1)
    advantages = _discounted_sum(reward + gamma * next_value - value, gamma * gae_lambda)
    return Advantages(advantages.to(values.dtype), (advantages + value).to(values.dtype))


def _discounted_sum(deltas: Tensor, discount: float) -> Tensor:
    """Return Σ_{s >= t} discount^(s-t) * deltas_s for each t, by a product with a triangular matrix.

    Blocks bound the matrix of a long response; each hands its first sum on to the block before it.
    """
    rows, length = deltas.shape
    step = min(length, _BLOCK)
    positions = torch.arange(step, device=deltas.device)
    distance = positions[:, None] - positions[None, :]
    exponents = torch.arange(step + 1, device=deltas.device, dtype=deltas.dtype)
    powers: Tensor = torch.full_like(exponents, discount) ** exponents
    matrix = torch.where(distance >= 0, powers[distance.clamp(min=0)], torch.zeros_like(powers[:1]))
    carry = deltas.new_zeros(rows, 1)
    sums: list[Tensor] = []
    for block in reversed(deltas.split(_BLOCK, dim=1)):
        size = block.shape[1]
        total = block @ matrix[:size, :size] + carry * powers[1 : size + 1].flip(0)
        carry = total[:, :1]
        sums.append(total)
    return torch.cat(sums[::-1], dim=1)
