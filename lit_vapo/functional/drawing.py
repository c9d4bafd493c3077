"""Draws from categorical distributions."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest float32 below 1.
_BELOW_ONE = 1 - 2.0**-24


def draw(probabilities: Tensor, times: Tensor | None = None) -> Tensor:
    """One index a row, by a race: each index needs a random time, and the less the likelier it is.

        index = argmin_i  E_i / p_i ,   E_i ~ Exp(1)

    This is the Gumbel-max trick without logarithms of p. Two distributions that race with the same times mostly draw
    the same index: with a probability of at least (1 − d) / (1 + d) where d is their total variation distance
    (arXiv 2408.07978). So two policies that answer with the same random numbers differ where they have to.
    `torch.multinomial` races too, but takes longer on a processor, since it draws exponential numbers one by one.

    Args:
        probabilities: `(B, V)`, not negative, with something positive in each row; a row need not sum to 1.
        times: `(B, V)`, E > 0; by default from torch's generator of the device.

    Returns:
        `(B,)` int64, indices in [0, V). What has probability 0 is not drawn.

    Examples:
        >>> p = torch.tensor([[0.5, 0.0, 0.25, 0.25]])
        >>> draw(p, torch.tensor([[1.0, 0.1, 0.4, 0.6]])).tolist()
        [2]
    """
    if times is None:
        # 31 random bits each: the small numbers that decide must not be steps of 2^-24, as those of `rand` are.
        bits = torch.empty_like(probabilities, dtype=torch.int32).random_().to(torch.float32)
        uniform = bits.add_(0.5).mul_(2.0**-31).clamp_max_(_BELOW_ONE)
        times = uniform.neg_().log1p_().neg_()
    return (probabilities / times).argmax(dim=-1)
