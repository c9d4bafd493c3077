"""How far features are from those of a reference: Mahalanobis distances with a shrunk covariance, and their bound."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_vapo.functional.masked import accumulation_dtype

FOLDS = 16


class Spread(NamedTuple):
    """A mean and a shrunk covariance Σ = floor·I + Σ_i gain_i·d_i·d_iᵀ of H features, as N rows leave it.

    Attributes:
        mean: `(H,)`.
        directions: `(r, H)`, orthonormal d_i, in which the rows differ.
        gains: `(r,)`, variance in these directions beyond the floor, >= 0.
        floor: `()`, variance in all other directions, > 0.
    """

    mean: Tensor
    directions: Tensor
    gains: Tensor
    floor: Tensor


def fit_spread(features: Tensor) -> Spread:
    """Mean and covariance of features, shrunk towards equal variances as far as N rows cannot tell them apart.

        Σ = (1 - ρ)·S + ρ·(tr S/H)·I,    ρ = min(1, mean_n ‖x_n·x_nᵀ - S‖² / N / ‖S - (tr S/H)·I‖²)

    with centred rows x_n and S = mean_n x_n·x_nᵀ. Source: Ledoit & Wolf (2004), Theorem 3.3 and section 3.3. All norms
    follow from the N × N products of the rows, and Σ is kept by its directions: no H × H matrix is made.

    Args:
        features: `(N, H)`, N >= 2.

    Returns:
        Spread, in float64 where the device has it.

    Raises:
        ValueError: if there are fewer than two rows, a feature is not finite, or no feature varies.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"expected features of shape (N, H) with N >= 2, got {tuple(features.shape)}")
    if not bool(torch.isfinite(features).all()):
        raise ValueError("expected finite features, got NaN or infinity")
    x = features.to(accumulation_dtype(features.device))
    count, width = x.shape
    mean = x.mean(0)
    _, singular, directions = torch.linalg.svd(x - mean, full_matrices=False)
    variances = singular.square() / count
    equal = variances.sum() / width
    if not bool(equal > 0):
        raise ValueError(f"expected features that differ between responses, got {count} equal rows")
    norms = (x - mean).square().sum(1)
    apart = variances.square().sum() - width * equal.square()
    unsure = (norms.square().mean() - variances.square().sum()) / count
    # Of one feature, or of features that vary alike, there is nothing to shrink.
    shrinkage = torch.where(apart > 0, (unsure / apart.clamp_min(torch.finfo(x.dtype).tiny)).clamp(0, 1), 1.0)
    floor = (shrinkage * equal).clamp_min(torch.finfo(torch.float32).eps * equal)
    return Spread(mean, directions, (1 - shrinkage) * variances, floor)


def squared_distance(features: Tensor, spread: Spread) -> Tensor:
    """Squared Mahalanobis distance of each row.

        (x - m)ᵀ·Σ⁻¹·(x - m) = ‖x - m‖²/floor - Σ_i (d_i·(x - m))²·(1/floor - 1/(floor + gain_i))

    Args:
        features: `(B, H)`.
        spread: what they are measured by.

    Returns:
        `(B,)`, without a unit.

    Raises:
        ValueError: if the width is another.

    Examples:
        >>> line = Spread(torch.zeros(2), torch.tensor([[1.0, 0.0]]), torch.tensor([3.0]), torch.tensor(1.0))
        >>> squared_distance(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), line)  # variances 4 and 1
        tensor([1., 4.])
    """
    if features.ndim != 2 or features.shape[1:] != spread.mean.shape:
        raise ValueError(f"expected features of shape (B, {len(spread.mean)}), got {tuple(features.shape)}")
    # Autocast would round the products.
    with torch.autocast(features.device.type, enabled=False):
        x = features.to(spread.mean) - spread.mean
        along = x @ spread.directions.T
        # Taken off row by row: the difference of two sums of squares would be mostly rounding.
        rest = x - along @ spread.directions
    return (along.square() / (spread.floor + spread.gains)).sum(1) + rest.square().sum(1) / spread.floor


def held_out_distances(features: Tensor) -> Tensor:
    """Squared distance of each row by the spread of the others: of all that are not in its part of `FOLDS`, or N/2.

    By the spread of all rows, rows are nearer than new ones will be: they have drawn the mean towards them and widened
    the covariance where they lie.

    Args:
        features: `(N, H)`, N >= 4.

    Returns:
        `(N,)`, without a unit.

    Raises:
        ValueError: if there are too few rows.
    """
    if len(features) < 4:
        raise ValueError(f"expected at least 4 rows to hold some out, got {len(features)}")
    folds = min(FOLDS, len(features) // 2)
    place = torch.arange(len(features), device=features.device) % folds
    found = torch.zeros(len(features), dtype=accumulation_dtype(features.device), device=features.device)
    for fold in range(folds):
        found[place == fold] = squared_distance(features[place == fold], fit_spread(features[place != fold]))
    return found


def outlier_bound(distances: Tensor, level: float) -> Tensor:
    """What a share `level` of the reference's squared distances lies beyond, if they are χ² up to a factor.

        a·χ²_ν(1 - level),    a = var/(2·mean),    ν = 2·mean²/var

    a and ν have the mean and the variance of the distances that were seen (Satterthwaite 1946). With a mean and a
    covariance that are known, and normal features, that is χ² with H degrees of freedom, as Miao et al.,
    arXiv 2510.13694, have it. Of a shrunk covariance from few rows H is not true: a far larger part of the reference's
    own responses would lie beyond the bound, or none.

    Args:
        distances: `(N,)`, squared distances of the reference's responses that the covariance does not come from.
        level: share in (0, 1).

    Returns:
        `()`.

    Raises:
        ValueError: if the level is out of range, or the distances do not vary.
    """
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, got {level}")
    mean, variance = distances.mean(), distances.var(correction=1)
    if not bool(variance > 0):
        raise ValueError("expected distances that vary, got equal ones")
    return variance / (2 * mean) * chi_square_quantile(1 - level, 2 * mean.square() / variance)


def chi_square_quantile(probability: float, degrees: Tensor) -> Tensor:
    """Where the distribution function of χ² with ν degrees of freedom has this value, by bisection.

    torch has the distribution function and not its inverse.

    Args:
        probability: in (0, 1).
        degrees: `()`, ν > 0, whole or not.

    Returns:
        `()`, in the dtype of `degrees`.

    Examples:
        >>> chi_square_quantile(0.99, torch.tensor(2.0))  # -2·log(0.01)
        tensor(9.2103)
    """
    half = degrees.detach().double().cpu() / 2
    low, high = torch.zeros_like(half), torch.ones_like(half)
    while bool(torch.special.gammainc(half, high / 2) < probability):
        high = 2 * high
    for _ in range(80):  # more than a double resolves
        middle = (low + high) / 2
        below = torch.special.gammainc(half, middle / 2) < probability
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return ((low + high) / 2).to(degrees)
