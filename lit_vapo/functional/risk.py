"""Pessimistic means over members or named rewards: between the mean and the least of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_vapo.functional.masked import accumulation_dtype


def soft_minimum(x: Tensor, temperature: float, weights: Tensor | None = None) -> Tensor:
    """The entropic mean, a minimum that is soft.

        -c · log Σ_k ω_k · exp(-x_k / c)

    It falls from the mean Σ_k ω_k·x_k (c → ∞) to the least x_k (c → 0). To second order in the spread of x it is
    mean - variance / (2c), with the variance under ω (ddof 0). It is the reward of KL-robust optimisation: the least
    of E_q[x] + c·KL(q‖ω) over distributions q.

    Source: the pessimistic branch of Hahami et al., arXiv 2606.09073, with ω uniform and c = β.

    Args:
        x: `(…, K)`.
        temperature: c >= 0, in units of x; 0 gives the least.
        weights: `(K,)`, ω >= 0, which sum to 1; None for 1/K each. Of a weight of zero nothing is seen.

    Returns:
        `(…)`, in units of x.

    Raises:
        ValueError: if there is nothing to take a minimum of, or c is negative.

    Examples:
        >>> soft_minimum(torch.tensor([0.0, 1.0]), 1.0)  # -log((1 + 1/e)/2)
        tensor(0.3799)
    """
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"expected x of shape (…, K) with K >= 1, got {tuple(x.shape)}")
    if not temperature >= 0:
        raise ValueError(f"expected temperature >= 0, got {temperature}")
    if weights is not None:
        x, weights = x[..., weights > 0], weights[weights > 0]
    least = x.amin(-1)
    if temperature == 0:
        return least
    above = (x - least[..., None]).to(accumulation_dtype(x.device))
    omega = torch.full_like(above, 1 / x.shape[-1]) if weights is None else weights.to(above)
    if math.isinf(temperature):
        return least + (omega * above).sum(-1).to(x.dtype)
    # By what is missing to 1: for a large c the logarithm of a sum near 1 would be nothing but rounding.
    missing = (omega * torch.expm1(-above / temperature)).sum(-1)
    return least - (temperature * torch.log1p(missing)).to(x.dtype)


def lower_tail_mean(x: Tensor, share: float) -> Tensor:
    """Mean of the worst share of some numbers: their conditional value at risk.

        1/(α·K) · Σ_j min(1, max(0, α·K - j)) · x_(j),    x_(0) <= x_(1) <= …

    Where α·K is no whole number, the next of them counts by the fraction that is left, so that the mean is continuous
    in α. α = 1 gives the mean, α <= 1/K the least. Source: Rockafellar & Uryasev (2002), Proposition 8, for losses -x
    that are equally likely.

    Args:
        x: `(…, K)`.
        share: α in (0, 1].

    Returns:
        `(…)`, in units of x.

    Raises:
        ValueError: if there are no numbers, or α is out of range.

    Examples:
        >>> lower_tail_mean(torch.tensor([4.0, 0.0, 1.0, 9.0]), 0.375)  # one and a half: (0 + 1/2)/1.5
        tensor(0.3333)
    """
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"expected x of shape (…, K) with K >= 1, got {tuple(x.shape)}")
    if not 0 < share <= 1:
        raise ValueError(f"expected a share above 0 and at most 1, got {share}")
    worst = x.sort(-1).values
    count = share * x.shape[-1]
    counts = (count - torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)).clamp(0, 1)
    # What does not count is left out, since zero times an infinity would not be.
    return torch.where(counts > 0, counts * worst, torch.zeros_like(worst)).sum(-1) / counts.sum()
