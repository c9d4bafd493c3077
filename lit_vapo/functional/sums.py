"""Weighted sums of reward estimates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_vapo.types import RewardEstimate


def weighted_estimate(
    estimates: Sequence[RewardEstimate], weights: Sequence[float], num_members: Sequence[int], aligned: bool = False
) -> RewardEstimate:
    """The estimate of Σ_i w_i·r_i from estimates of each r_i on the same B responses.

        mean = Σ_i w_i·mean_i,    variance = Σ_i w_i²·variance_i

    That is the variance of a sum whose terms err independently of each other. With `aligned` member k of each source is
    the same draw, and r_k = Σ_i w_i·r_ik has its unbiased variance over k (ddof 1), covariances included. A source with
    one member is taken as exact: it adds to the mean, and to each member. A weight of 0 leaves a source out.

    Args:
        estimates: One of each source, at least one with a weight.
        weights: w_i of each.
        num_members: K_i of each; those of 2 or more have a variance.
        aligned: Whether member k stands for the same draw in all sources with a variance; these then have the same K.

    Returns:
        RewardEstimate. Its members are `(B, K)` where one source has a variance or all are aligned, `(B, 1)` where none
        has one, and otherwise None. Its reference variance is Σ_i w_i²·v_i over the sources with a variance, and None
        where one of these has none, where none has a variance, or where several are aligned (it has to be measured).
        It applies where any source does.

    Raises:
        ValueError: The lists differ in length, or no weight is other than 0.

    Examples:
        >>> one = RewardEstimate(torch.tensor([2.0]), torch.tensor([2.0]), torch.tensor([[1.0, 3.0]]))
        >>> both = weighted_estimate([one, one], [1.0, -1.0], [2, 2])
        >>> both.mean, both.variance
        (tensor([0.]), tensor([4.]))
        >>> weighted_estimate([one, one], [1.0, -1.0], [2, 2], aligned=True).variance
        tensor([0.])
    """
    if not len(estimates) == len(weights) == len(num_members):
        raise ValueError(f"expected as many weights and counts as estimates, got {len(weights)}, {len(num_members)}")
    terms = [term for term in zip(estimates, weights, num_members, strict=True) if term[1]]
    if not terms:
        raise ValueError(f"expected a weight other than 0, got {list(weights)}")
    mean = _total([weight * estimate.mean for estimate, weight, _ in terms])
    applies = [estimate.applies for estimate, _, _ in terms]
    known = [x for x in applies if x is not None]
    anywhere = torch.stack(known).any(0) if len(known) == len(applies) else None
    uncertain = [(estimate, weight) for estimate, weight, count in terms if count > 1]
    if not uncertain:
        return RewardEstimate(mean, torch.zeros_like(mean), mean[:, None], applies=anywhere)
    exact = [weight * estimate.mean for estimate, weight, count in terms if count == 1]
    members = None
    if aligned or len(uncertain) == 1:
        own = [weight * estimate.members for estimate, weight in uncertain if estimate.members is not None]
        if len(own) == len(uncertain):
            members = _total([*own, *(x[:, None] for x in exact)])
    if len(uncertain) > 1 and members is not None:
        return RewardEstimate(mean, members.var(dim=1, correction=1), members, applies=anywhere)
    variance = _total([weight**2 * estimate.variance for estimate, weight in uncertain])
    units = [weight**2 * e.reference_variance for e, weight in uncertain if e.reference_variance is not None]
    unit = _total(units) if len(units) == len(uncertain) else None
    return RewardEstimate(mean, variance, members, unit, applies=anywhere)


def _total(parts: Sequence[Tensor]) -> Tensor:
    """Sum of tensors that can be broadcast together."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
