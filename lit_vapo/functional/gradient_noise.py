"""How much of a gradient is signal, from two halves of its batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class GradientSignal(NamedTuple):
    """What two halves of a batch say of the gradient of the whole.

    Attributes:
        cosine: `()`, cosine of the gradients of the halves, from -1 to 1; NaN where one is zero.
        share: `()`, estimate of the share of the whole's squared norm that is signal; NaN where the whole is zero.
    """

    cosine: Tensor
    share: Tensor


def gradient_signal(first: Tensor, whole: Tensor, first_share: float | Tensor = 0.5) -> GradientSignal:
    """Cosine of the gradients of two halves, and the share of the squared norm of the whole that is signal.

        g = g1 + g2,    cosine = g1·g2 / (|g1| |g2|),    share = g1·g2 / (f1 f2 |g|²)

    with f1 + f2 = 1 the shares of the batch in the halves, and g_k sums over the rows of a half, divided by what the
    whole is divided by. A row's gradient is μ, the one that all rows there could be have on average, and noise. So
    E[g_k] = f_k·μ, and where halves are drawn apart, E[g1·g2] = f1 f2 |μ|²: g1·g2/(f1 f2) is an estimate of |μ|²
    without bias, while |g|² is |μ|² and noise. With halves alike, the share is 4 g1·g2/|g|² = 2c/(1 + c) with c the
    cosine (the Spearman–Brown formula). It is below zero by chance where there is hardly any signal.

    Source: McCandlish et al., arXiv 1812.06162, appendix A.1, whose |G|² from batches of two sizes is g1·g2/(f1 f2) for
    one batch and its halves. Their noise scale is B·(1/share - 1) for B rows.

    Args:
        first: `(P,)`, g1.
        whole: `(P,)`, g. The same entries of both, all or as many as tell.
        first_share: f1, in (0, 1).

    Returns:
        GradientSignal, in float32 at least.

    Raises:
        ValueError: if shapes differ or f1 is out of range.

    Examples:
        >>> cosine, share = gradient_signal(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0]))  # g2 = (1, 1)
        >>> [round(x.item(), 4) for x in (cosine, share)]  # 1/√2, and 1 / (1/4 · 5)
        [0.7071, 0.8]
    """
    if first.shape != whole.shape:
        raise ValueError(f"expected whole of shape {tuple(first.shape)}, as first, got {tuple(whole.shape)}")
    if not 0 < first_share < 1:
        raise ValueError(f"expected first_share between 0 and 1, got {float(first_share)}")
    first, whole = (x if x.dtype == torch.float64 else x.float() for x in (first, whole))
    second = whole - first
    dot = (first * second).sum()
    return GradientSignal(
        dot / (first.norm() * second.norm()), dot / (first_share * (1 - first_share) * whole.square().sum())
    )
