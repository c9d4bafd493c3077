"""How far a share or an AUROC of few pairs may be off."""

from __future__ import annotations

import math
from typing import NamedTuple

NORMAL_95 = 1.959964


class Interval(NamedTuple):
    """A 95% interval."""

    low: float
    high: float


def share_interval(share: float, count: int) -> Interval:
    """95% interval of a share that was seen in `count` cases.

        ( p + z²/2n ± z·√(p(1 − p)/n + z²/4n²) ) / (1 + z²/n)

    Source: Wilson (1927); it stays within [0, 1] and holds for few cases, where ± 2 standard errors do not.

    Args:
        share: In [0, 1].
        count: Cases n, at least 1.

    Raises:
        ValueError: A number is out of its range.

    Examples:
        >>> [round(x, 3) for x in share_interval(0.5, 4)]
        [0.15, 0.85]
    """
    if count < 1 or not 0 <= share <= 1:
        raise ValueError(f"expected a share in [0, 1] of at least one case, got {share} of {count}")
    z2 = NORMAL_95**2 / count
    middle = share + z2 / 2
    half = NORMAL_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return Interval(max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2)))


def auroc_interval(area: float, positives: int, negatives: int) -> Interval:
    """95% interval of an AUROC.

        SE² = ( A(1 − A) + (P − 1)(Q₁ − A²) + (N − 1)(Q₂ − A²) ) / PN,   Q₁ = A/(2 − A),   Q₂ = 2A²/(1 + A)

    Source: Hanley & McNeil (1982), equation 1 with the exponential approximation of Q₁ and Q₂. Cut at 0 and 1.

    Args:
        area: A, in [0, 1].
        positives: P, at least 1.
        negatives: N, at least 1.

    Raises:
        ValueError: A number is out of its range.

    Examples:
        >>> [round(x, 3) for x in auroc_interval(0.5, 2, 2)]
        [0.0, 1.0]
    """
    if min(positives, negatives) < 1 or not 0 <= area <= 1:
        raise ValueError(f"expected an area in [0, 1] of both kinds, got {area} of {positives} and {negatives}")
    square = area * area
    one, two = area / (2 - area) - square, 2 * square / (1 + area) - square
    variance = (area * (1 - area) + (positives - 1) * one + (negatives - 1) * two) / (positives * negatives)
    half = NORMAL_95 * math.sqrt(variance)
    return Interval(max(0.0, area - half), min(1.0, area + half))
