"""Mean and variance over ensemble members, how to make members comparable, and their bootstrap."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from lit_vapo.functional.masked import check_same_shape
from lit_vapo.types import RewardEstimate

_MASK_64 = 2**64 - 1


def _check_members(members: Tensor, name: str = "members") -> None:
    """Raise ValueError unless `members` is (B, K) with K >= 1."""
    if members.ndim != 2 or members.shape[1] == 0:
        raise ValueError(f"expected {name} of shape (B, K) with K >= 1, got {tuple(members.shape)}")


def ensemble_estimate(members: Tensor) -> RewardEstimate:
    """Mean and unbiased variance over the members of an ensemble.

    Args:
        members: `(B, K)`, each member's score, members made comparable beforehand (`normalise_members`).

    Returns:
        RewardEstimate with mean `(B,)`, variance `(B,)` (ddof 1; zeros for K = 1, where it is not defined)
        and `members`.

    Raises:
        ValueError: if `members` is not `(B, K)`.

    Examples:
        >>> estimate = ensemble_estimate(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
        >>> estimate.mean, estimate.variance
        (tensor([2., 2.]), tensor([2., 0.]))
    """
    _check_members(members)
    mean = members.mean(dim=1)
    variance = members.var(dim=1, correction=1) if members.shape[1] > 1 else torch.zeros_like(mean)
    return RewardEstimate(mean, variance, members)


def margin_estimate(chosen: Tensor, rejected: Tensor) -> RewardEstimate:
    """Mean and unbiased variance of each member's own difference between two responses.

    The variance of a margin is not the sum of two variances: an offset of a member that both responses share
    cancels here.

    Args:
        chosen: `(B, K)`, each member's score of the first response.
        rejected: `(B, K)`, each member's score of the second.

    Returns:
        RewardEstimate of chosen - rejected.

    Raises:
        ValueError: if the shapes are not `(B, K)` or differ.

    Examples:
        >>> margin_estimate(torch.tensor([[1.0, 11.0]]), torch.tensor([[0.0, 10.0]])).variance
        tensor([0.])
    """
    _check_members(chosen, "chosen")
    check_same_shape(chosen=chosen, rejected=rejected)
    return ensemble_estimate(chosen - rejected)


def fit_normaliser(members: Tensor, scale_floor: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Location and scale of each member over responses of the reference policy.

    A Bradley-Terry reward is identified only up to a shift, and members differ in scale; the variance over
    members means something only after both are removed.

    Args:
        members: `(N, K)`, each member's score of N responses of the reference policy.
        scale_floor: smallest scale returned, in units of reward, so that a member with one constant score
            stays finite.

    Returns:
        Mean `(K,)` and standard deviation `(K,)` (ddof 1) over the responses.

    Raises:
        ValueError: if there are fewer than two responses, or a member has a score that is not finite (naming
            the member).

    Examples:
        >>> fit_normaliser(torch.tensor([[0.0, 10.0], [2.0, 14.0]]))
        (tensor([ 1., 12.]), tensor([1.4142, 2.8284]))
    """
    _check_members(members)
    if members.shape[0] < 2:
        raise ValueError(f"expected at least 2 responses to fit a normaliser, got {members.shape[0]}")
    if not scale_floor > 0:
        raise ValueError(f"expected scale_floor > 0, got {scale_floor}")
    finite = torch.isfinite(members).all(dim=0)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise ValueError(
            f"expected finite scores, got {int((~torch.isfinite(members[:, bad])).sum())} of "
            f"{members.shape[0]} scores not finite for member {bad}"
        )
    return members.mean(dim=0), members.std(dim=0, correction=1).clamp(min=scale_floor)


def normalise_members(members: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale each member: (members - loc) / scale.

    Args:
        members: `(B, K)`, raw scores.
        loc: `(K,)`, as `fit_normaliser` returns it.
        scale: `(K,)`, likewise, positive.

    Returns:
        `(B, K)`, in standard deviations of the reference policy's responses.

    Raises:
        ValueError: if shapes do not fit.

    Examples:
        >>> normalise_members(torch.tensor([[3.0, 8.0]]), torch.tensor([1.0, 10.0]), torch.tensor([2.0, 4.0]))
        tensor([[ 1.0000, -0.5000]])
    """
    _check_members(members)
    for name, tensor in (("loc", loc), ("scale", scale)):
        if tensor.shape != members.shape[1:]:
            raise ValueError(f"expected {name} of shape ({members.shape[1]},), got {tuple(tensor.shape)}")
    return (members - loc) / scale


def constant_share(members: Tensor) -> Tensor:
    """Share of the members' variance that is one constant for each member, the same for all responses.

        var_k( mean_n r_nk ) / mean_n var_k( r_nk )

    What remains is how members differ about the responses: mean_n var_k(r_nk − mean_n r_nk) = (1 − share) of the whole.

    Args:
        members: `(N, K)`, each member's score of N responses.

    Returns:
        `()`, in [0, 1]: 0 where members differ about responses alone, 1 where they differ by constants alone; NaN where
        they do not differ, or there is one.

    Raises:
        ValueError: if `members` is not `(N, K)`.

    Examples:
        >>> constant_share(torch.tensor([[1.0, 3.0], [2.0, 4.0]]))
        tensor(1.)
    """
    _check_members(members)
    if members.shape[1] < 2:
        return members.new_tensor(math.nan)
    return members.mean(dim=0).var(correction=1) / members.var(dim=1, correction=1).mean()


def poisson_bootstrap(example_ids: Tensor, num_members: int, seed: int) -> Tensor:
    """Poisson(1) count of each example for each member, as a pure function of (seed, member, example id).

    An online bootstrap (Oza & Russell 2001): counts are independent between members and examples, and the
    same example gets the same count in every epoch, batch order and process. Uniform integers (as in
    `example_uniforms`) are inverted through the Poisson distribution function, so there is no generator to save.

    Args:
        example_ids: `(B,)` int64, distinct for distinct examples.
        num_members: K >= 1.
        seed: any integer, taken modulo 2**64.

    Returns:
        `(B, K)` float32 counts 0, 1, 2, …

    Raises:
        ValueError: if the ids are not a vector of int64 or num_members < 1.

    Examples:
        >>> a = poisson_bootstrap(torch.tensor([7, 8]), num_members=3, seed=0)
        >>> b = poisson_bootstrap(torch.tensor([8, 7]), num_members=3, seed=0)
        >>> bool((a == b.flip(0)).all())
        True
    """
    if num_members < 1:
        raise ValueError(f"expected num_members >= 1, got {num_members}")
    uniform = _uniform_integers(example_ids, num_members, seed)
    return torch.searchsorted(_poisson_thresholds(example_ids.device), uniform, right=True).float()


def example_uniforms(example_ids: Tensor, count: int, seed: int) -> Tensor:
    """Uniform numbers of each example, as a pure function of (seed, place, example id).

    The finaliser of SplitMix64 (Steele, Lea & Flood 2014) makes them: an example gets the same ones in every batch,
    order and process.

    Args:
        example_ids: `(B,)` int64, distinct for distinct examples.
        count: How many for each example.
        seed: any integer, taken modulo 2**64.

    Returns:
        `(B, count)` float32 in [0, 1).

    Raises:
        ValueError: if the ids are not a vector of int64.

    Examples:
        >>> example_uniforms(torch.tensor([7]), 1000, seed=0).mean().round(decimals=1)
        tensor(0.5000)
    """
    # As many bits as a float32 holds: more could round up to 1.
    return _shift_right(_uniform_integers(example_ids, count, seed), 39).float() / 2**24


def _uniform_integers(example_ids: Tensor, count: int, seed: int) -> Tensor:
    """Uniform integers in [0, 2**63), (B, count)."""
    if example_ids.ndim != 1 or example_ids.dtype != torch.int64:
        got = f"{tuple(example_ids.shape)} of {example_ids.dtype}"
        raise ValueError(f"expected example_ids (B,) of torch.int64, got {got}")
    start = _splitmix64(torch.tensor(_signed(seed), dtype=torch.int64, device=example_ids.device))
    streams = _splitmix64(start + torch.arange(count, device=example_ids.device))
    # Hashing between the additions keeps (place, id) and (place + 1, id - 1) apart.
    return _shift_right(_splitmix64(streams[None, :] + _splitmix64(example_ids)[:, None]), 1)


def nuclear_diversity(matrices: Tensor) -> Tensor:
    """How differently the members' matrices point: their nuclear norm side by side, relative to the largest.

        ‖[M_1; …; M_K]‖_* / ( √min(K·r, n) · ‖[M_1; …; M_K]‖_F )

    After Zhai et al., arXiv 2401.00243, who maximise the nuclear norm itself; divided by the Frobenius norm and the
    root of the rank it is bounded, and larger matrices alone gain nothing.

    Args:
        matrices: `(K, r, n)`.

    Returns:
        `()`, in (0, 1]: 1 where all rows are orthogonal and of equal length, 1/√min(K·r, n) where all are parallel.

    Raises:
        ValueError: if the shape is another.

    Examples:
        >>> nuclear_diversity(torch.eye(4).view(2, 2, 4)).item()
        1.0
        >>> nuclear_diversity(torch.ones(2, 2, 4)).item()
        0.5
    """
    if matrices.ndim != 3:
        raise ValueError(f"expected matrices of shape (K, r, n), got {tuple(matrices.shape)}")
    stacked = matrices.flatten(0, 1).float()
    singular = torch.linalg.svdvals(stacked)
    return singular.sum() / (len(singular) ** 0.5 * torch.linalg.vector_norm(stacked))


@cache
def _poisson_thresholds(device: torch.device) -> Tensor:
    """Return floor(2**63 * P(X <= n)) for X ~ Poisson(1), n = 0, 1, …, while that is below 2**63."""
    thresholds: list[int] = []
    cumulative, n = 0.0, 0
    while True:
        cumulative += math.exp(-1.0) / math.factorial(n)
        threshold = int(cumulative * 2.0**63)
        if threshold >= 2**63 or (thresholds and threshold == thresholds[-1]):
            return torch.tensor(thresholds, dtype=torch.int64, device=device)
        thresholds.append(threshold)
        n += 1


def _signed(value: int) -> int:
    """Return the int64 with the low 64 bits of `value`."""
    value &= _MASK_64
    return value - 2**64 if value >= 2**63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right and fill with zeros (torch's own shift copies the sign bit)."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _splitmix64(x: Tensor) -> Tensor:
    """Hash int64 to int64, one to one; products wrap around."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)
