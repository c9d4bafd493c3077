"""Sums, means, variances and whitening over the True positions of a mask.

Values outside the mask are selected away with `torch.where`, never multiplied by zero, so NaN in padding
reaches neither the result nor the gradient. Statistics are accumulated in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Sufficient statistics of a masked tensor. They add: sum the three over ranks to get the global ones.

    Attributes:
        count: `()`, number of True positions.
        sum: `()`, sum over them.
        sum_sq: `()`, sum of squares over them.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    sum: Tensor
    sum_sq: Tensor


def check_same_shape(**tensors: Tensor) -> None:
    """Check that all tensors have the shape of the first.

    Args:
        **tensors: tensors by the name the caller knows them under.

    Raises:
        ValueError: if a shape differs, naming both tensors.
    """
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != reference.shape:
            raise ValueError(
                f"expected {name} of shape {tuple(reference.shape)}, as {first}, got {tuple(tensor.shape)}"
            )


def check_mask(x: Tensor, mask: Tensor, name: str = "x") -> None:
    """Check that `mask` is boolean and has the shape of `x`.

    Args:
        x: any tensor.
        mask: the mask to check.
        name: what the caller calls `x`.

    Raises:
        ValueError: if the dtype is not bool (a 0/1 integer mask may have either polarity) or the shapes
            differ.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"expected a mask of dtype torch.bool (True = counts), got {mask.dtype}")
    if mask.shape != x.shape:
        raise ValueError(f"expected a mask of shape {tuple(x.shape)}, as {name}, got {tuple(mask.shape)}")


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating dtype of a device: float64, or float32 on Apple's MPS, which has no float64.

    Args:
        device: where the sums are computed.

    Returns:
        torch.float64 or torch.float32.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def _select(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` in the accumulation dtype, zero outside the mask."""
    check_mask(x, mask)
    wide = x.to(accumulation_dtype(x.device))
    return torch.where(mask, wide, torch.zeros_like(wide))


def _moments(selected: Tensor, mask: Tensor) -> Moments:
    """Return the moments of what `_select` returned."""
    return Moments(mask.sum().to(selected.dtype), selected.sum(), selected.square().sum())


def _float_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of results about `x`: its own, or the default one where it holds integers or bools."""
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum `x` over the True positions of `mask`.

    Args:
        x: any shape.
        mask: bool, same shape, True = counts.
        dim: dimension to sum over; None for all.

    Returns:
        The sum, 0 where the mask has no True.

    Raises:
        ValueError: if the mask is not boolean or its shape differs.

    Examples:
        >>> masked_sum(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False]))
        tensor(3.)
    """
    selected = _select(x, mask)
    total = selected.sum() if dim is None else selected.sum(dim)
    return total.to(_float_dtype(x))


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Average `x` over the True positions of `mask`.

    Args:
        x: any shape.
        mask: bool, same shape, True = counts.
        dim: dimension to average over; None for all.

    Returns:
        The mean; 0 where the mask has no True, so that an empty row neither fails nor poisons a gradient.

    Raises:
        ValueError: if the mask is not boolean or its shape differs.

    Examples:
        >>> x = torch.tensor([[1.0, 2.0, float("nan")], [4.0, 0.0, 0.0]])
        >>> masked_mean(x, torch.tensor([[True, True, False], [True, False, False]]), dim=1)
        tensor([1.5000, 4.0000])
    """
    selected = _select(x, mask)
    total, count = (selected.sum(), mask.sum()) if dim is None else (selected.sum(dim), mask.sum(dim))
    return (total / count.clamp(min=1)).to(_float_dtype(x))


def masked_var(
    x: Tensor, mask: Tensor, unbiased: bool = True, all_sum: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Variance of `x` over the True positions of `mask`.

    Args:
        x: any shape.
        mask: bool, same shape, True = counts.
        unbiased: divide by count - 1 (ddof 1) rather than by count.
        all_sum: sum of a tensor over all processes, for the variance over all of them.

    Returns:
        `()`, in units of x squared; 0 where fewer than two positions count.

    Raises:
        ValueError: if the mask is not boolean or its shape differs.

    Examples:
        >>> masked_var(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    selected, total = _select(x, mask), all_sum or (lambda part: part)
    count = total(mask.sum())
    deviation = torch.where(mask, selected - total(selected.sum()) / count.clamp(min=1), torch.zeros_like(selected))
    return (total(deviation.square().sum()) / (count - int(unbiased)).clamp(min=1)).to(_float_dtype(x))


def moments(x: Tensor, mask: Tensor) -> Moments:
    """Count, sum and sum of squares of `x` over the True positions of `mask`, in float64.

    Args:
        x: any shape.
        mask: bool, same shape, True = counts.

    Returns:
        Moments of shape `()`. Their sums over disjoint parts (ranks, microbatches) are the moments of the
        whole.

    Raises:
        ValueError: if the mask is not boolean or its shape differs.
    """
    return _moments(_select(x, mask), mask)


def masked_whiten(x: Tensor, mask: Tensor, moments: Moments | None = None, eps: float = 1e-8) -> Tensor:
    """Shift and scale `x` to zero mean and unit variance (ddof 1) over the True positions of `mask`.

        (x - mean) / sqrt(var + eps)

    Unlike torchtune's and OpenAI's `whiten`, the mean is not added back.

    Args:
        x: any shape.
        mask: bool, same shape, True = counts.
        moments: statistics to whiten with, e.g. those of all ranks; None for those of `x` itself.
        eps: added to the variance, in units of x squared.

    Returns:
        Same shape and dtype as `x`, zeros outside the mask.

    Raises:
        ValueError: if the mask is not boolean or its shape differs.

    Examples:
        >>> masked_whiten(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
        tensor([-0.7071,  0.7071,  0.0000])
    """
    selected = _select(x, mask)
    found = _moments(selected, mask) if moments is None else moments
    whitened = (selected - found.sum / found.count.clamp(min=1)) * whitening_scale(found, eps)
    return torch.where(mask, whitened, torch.zeros_like(whitened)).to(_float_dtype(x))


def whitening_scale(moments: Moments, eps: float = 1e-8) -> Tensor:
    """By what `masked_whiten` multiplies, 1 / sqrt(var + eps).

    Args:
        moments: what it whitens with.
        eps: added to the variance.

    Returns:
        `()`, per unit of x.

    Examples:
        >>> x, mask = torch.tensor([1.0, 5.0]), torch.ones(2, dtype=torch.bool)
        >>> whitening_scale(moments(x, mask), eps=1.0)  # variance 8
        tensor(0.3333, dtype=torch.float64)
    """
    count, total, total_sq = moments
    # Rounding may leave a constant tensor with a variance just below zero.
    variance = ((total_sq - total * (total / count.clamp(min=1))) / (count - 1).clamp(min=1)).clamp(min=0)
    return torch.rsqrt(variance + eps)
