"""Draws from categorical distributions."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_vapo.functional.masked import accumulation_dtype


def draw(probabilities: Tensor, uniform: Tensor | None = None) -> Tensor:
    """One index a row, drawn by the inverse of the cumulated probabilities.

        index = the least i with  p_0 + … + p_i  >  u · (p_0 + … + p_{V−1})

    A row takes one random number, where `torch.multinomial` makes one for each of the V entries. What has probability
    0 is never drawn. Sums are taken in float64, so a row need not sum to 1 exactly.

    Args:
        probabilities: `(B, V)`, not negative, with a positive sum in each row.
        uniform: `(B,)`, u in [0, 1), independent and uniform; by default from torch's generator of the device.

    Returns:
        `(B,)` int64, indices in [0, V).

    Examples:
        >>> p = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).expand(4, 4)
        >>> draw(p, torch.tensor([0.0, 0.49, 0.5, 0.99])).tolist()
        [0, 0, 2, 3]
    """
    cumulated = probabilities.cumsum(dim=-1, dtype=accumulation_dtype(probabilities.device))
    total = cumulated[:, -1]
    u = torch.rand_like(total) if uniform is None else uniform.to(total)
    # Rounding must not reach the total: behind it there is nothing.
    goal = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, goal[:, None], right=True)[:, 0]
