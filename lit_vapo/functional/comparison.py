"""Two policies on the same prompts. P counts prompts; N and M the responses to each of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Gain(NamedTuple):
    """How much better one policy is than another.

    Attributes:
        mean: `()`, mean difference of scores, in their unit.
        standard_error: `()`, its standard error over prompts; NaN where there is one prompt.
    """

    mean: Tensor
    standard_error: Tensor


def _check(ours: Tensor, theirs: Tensor) -> None:
    """Raise ValueError unless the arguments are (P, N) and (P, M) with P, N, M >= 1."""
    fits = ours.ndim == theirs.ndim == 2 and len(ours) == len(theirs) and 0 not in (*ours.shape, *theirs.shape)
    if not fits:
        raise ValueError(
            f"expected scores of shapes (P, N) and (P, M) with P, N, M >= 1, got {tuple(ours.shape)} and "
            f"{tuple(theirs.shape)}"
        )


def win_rate(ours: Tensor, theirs: Tensor) -> Tensor:
    """How often a response of ours scores higher than one of theirs to the same prompt, ties counted half.

        1/P · Σ_p 1/(N·M) · Σ_ij ( 1[ours_pi > theirs_pj] + ½·1[ours_pi = theirs_pj] )

    Args:
        ours: `(P, N)`, scores; any unit.
        theirs: `(P, M)`, scores by the same judge.

    Returns:
        `()`, in [0, 1]; ½ for equal policies.

    Raises:
        ValueError: if the shapes do not fit.

    Examples:
        >>> win_rate(torch.tensor([[2.0], [1.0]]), torch.tensor([[1.0], [1.0]]))
        tensor(0.7500)
    """
    _check(ours, theirs)
    difference = ours[:, :, None] - theirs[:, None, :]
    return (0.5 * (difference.sign() + 1)).mean()


def paired_gain(ours: Tensor, theirs: Tensor) -> Gain:
    """Mean difference of scores, prompt by prompt, with the standard error of that mean over prompts.

        d_p = mean_i ours_pi − mean_j theirs_pj,   mean = 1/P · Σ d_p,   standard error = √( var(d) / P ), ddof 1

    Args:
        ours: `(P, N)`, scores; any unit.
        theirs: `(P, M)`, scores by the same judge.

    Returns:
        Gain, in the unit of the scores.

    Raises:
        ValueError: if the shapes do not fit.

    Examples:
        >>> gain = paired_gain(torch.tensor([[2.0], [1.0]]), torch.tensor([[1.0], [1.0]]))
        >>> gain.mean, gain.standard_error
        (tensor(0.5000), tensor(0.5000))
    """
    _check(ours, theirs)
    difference = ours.mean(dim=1) - theirs.mean(dim=1)
    mean, size = difference.mean(), len(difference)
    error = difference.std(correction=1) / math.sqrt(size) if size > 1 else torch.full_like(mean, math.nan)
    return Gain(mean, error)
