"""Does an ensemble know what it does not know: its spread against its errors.

N counts pairs (or responses), K members. Ranks and sums are taken in double precision, and results come back in the
precision of the first argument.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_vapo.functional.masked import check_same_shape

TEMPERATURE_RANGE = (1e-2, 1e2)


class RiskCoverage(NamedTuple):
    """Mean error among the least uncertain pairs, by how many of them are kept.

    Attributes:
        coverage: `(N,)`, share of the pairs that is kept: 1/N, 2/N, …, 1.
        risk: `(N,)`, mean error among those kept.
        area: `()`, area under the curve (AURC), the mean of the risks; lower is better.
        best_area: `()`, the area if pairs were kept in the order of their true errors; area - best_area is the
            excess area (E-AURC).
    """

    coverage: Tensor
    risk: Tensor
    area: Tensor
    best_area: Tensor


def _check_vector(x: Tensor, name: str) -> None:
    """Raise ValueError unless `x` is (N,) with N >= 1 and free of NaN."""
    if x.ndim != 1 or x.shape[0] == 0:
        raise ValueError(f"expected {name} of shape (N,) with N >= 1, got {tuple(x.shape)}")
    if bool(torch.isnan(x).any()):
        raise ValueError(f"expected {name} without NaN, got {int(torch.isnan(x).sum())} in {x.shape[0]}")


def _average_ranks(x: Tensor) -> Tensor:
    """Ranks 1 … N in double precision; equal values share the mean of their ranks."""
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def auroc(scores: Tensor, positives: Tensor) -> Tensor:
    """Area under the ROC curve: how often a positive scores higher than a negative, ties counted half.

        AUROC = ( Σ ranks of positives − P (P + 1) / 2 ) / (P · (N − P)),   P positives, average ranks

    Source: the Mann–Whitney statistic; Hanley & McNeil (1982). Scores that are all equal give 0.5.

    Args:
        scores: `(N,)`, larger for what should be positive; any unit.
        positives: `(N,)` bool.

    Returns:
        `()`, in [0, 1]; NaN where there is no positive or no negative, for which it is not defined.

    Raises:
        ValueError: if shapes differ, there are no scores or a NaN among them, or `positives` is not bool.

    Examples:
        >>> auroc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([False, False, True, True]))
        tensor(0.8750)
    """
    _check_vector(scores, "scores")
    check_same_shape(scores=scores, positives=positives)
    if positives.dtype != torch.bool:
        raise ValueError(f"expected positives of torch.bool, got {positives.dtype}")
    p = positives.sum().double()
    above = _average_ranks(scores)[positives].sum() - p * (p + 1) / 2
    return (above / (p * (len(scores) - p))).to(scores.dtype)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation: Pearson's correlation of the ranks, equal values sharing their mean rank.

    Args:
        a: `(N,)`, any unit.
        b: `(N,)`, any unit.

    Returns:
        `()`, in [-1, 1]; NaN where `a` or `b` is constant, for which it is not defined.

    Raises:
        ValueError: if shapes differ, or there are no values or a NaN among them.

    Examples:
        >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 10.0, 7.0]))
        tensor(0.5000)
    """
    _check_vector(a, "a")
    _check_vector(b, "b")
    check_same_shape(a=a, b=b)
    x, y = _average_ranks(a), _average_ranks(b)
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()).to(a.dtype)


def risk_coverage(uncertainty: Tensor, error: Tensor) -> RiskCoverage:
    """Risk-coverage curve of keeping the least uncertain pairs, and the area under it.

        risk(k) = 1/k · Σ of the errors of the k least uncertain pairs,   AURC = 1/N · Σ_k risk(k)

    Pairs of equal uncertainty have no order, and a sort would choose one. We take the expected value over all
    their orders, in which each of them adds the mean error of its group. So an ensemble without any spread has
    the flat curve of a random order.

    Source: El-Yaniv & Wiener (JMLR 2010); Geifman & El-Yaniv, arXiv 1705.08500; AURC and E-AURC from Geifman,
    Uziel & El-Yaniv, arXiv 1805.08206, section 3. The best area is computed from the errors themselves, not by
    their approximation r + (1 − r) log(1 − r).

    Args:
        uncertainty: `(N,)`, any unit.
        error: `(N,)`, loss of each pair, e.g. 1 for a wrong answer and 0 for a right one.

    Returns:
        RiskCoverage.

    Raises:
        ValueError: if shapes differ, or there are no pairs or a NaN among them.

    Examples:
        >>> curve = risk_coverage(torch.tensor([0.3, 0.1, 0.2]), torch.tensor([1.0, 0.0, 0.0]))
        >>> curve.risk, curve.area
        (tensor([0.0000, 0.0000, 0.3333]), tensor(0.1111))
    """
    _check_vector(uncertainty, "uncertainty")
    _check_vector(error, "error")
    check_same_shape(uncertainty=uncertainty, error=error)
    losses = error.double()
    _, inverse, counts = torch.unique(uncertainty, return_inverse=True, return_counts=True)
    totals = losses.new_zeros(len(counts)).scatter_add(0, inverse, losses)
    kept = torch.arange(1, len(losses) + 1, device=error.device)
    risk = (totals / counts).repeat_interleave(counts).cumsum(0) / kept
    best = losses.sort().values.cumsum(0) / kept
    dtype = uncertainty.dtype
    return RiskCoverage((kept / len(losses)).to(dtype), risk.to(dtype), risk.mean().to(dtype), best.mean().to(dtype))


def disagreement(members: Tensor) -> Tensor:
    """Share of pairs on which the members do not all prefer the same response.

    A member with a margin of exactly zero prefers neither, which is another opinion than preferring one.

    Args:
        members: `(N, K)`, each member's margin.

    Returns:
        `()`, in [0, 1]; 0 for one member.

    Raises:
        ValueError: if the shape is another, or there are no pairs or no members.

    Examples:
        >>> disagreement(torch.tensor([[1.0, 2.0], [1.0, -2.0]]))
        tensor(0.5000)
    """
    if members.ndim != 2 or 0 in members.shape:
        raise ValueError(f"expected members of shape (N, K) with N, K >= 1, got {tuple(members.shape)}")
    sides = torch.sign(members)
    return (sides != sides[:, :1]).any(dim=1).to(members.dtype).mean()


def fit_temperature(margins: Tensor, probability: Tensor | None = None) -> Tensor:
    """Temperature T by which margins must be divided to make their likelihood largest.

        T = argmin 1/N · Σ_n −p_n log σ(m_n / T) − (1 − p_n) log σ(−m_n / T)

    The loss is convex in 1/T, so the sign of its slope tells the side, and bisection finds the zero. T is held
    within [1e-2, 1e2]: where every margin is on the right side the likelihood grows without end as T → 0, and
    T is 1e-2; where the margins say no more than a coin (or worse), T is 1e2. Margins that are all zero leave
    T open: T is 1.

    Source: temperature scaling, Guo et al., arXiv 1706.04599, section 4.2.

    Args:
        margins: `(N,)`, chosen minus rejected, in log-odds, of pairs that the ensemble was not trained on.
        probability: `(N,)`, probability in [0, 1] that chosen is the better one; None for 1.

    Returns:
        `()`, positive. Above 1 where margins were overconfident.

    Raises:
        ValueError: if shapes differ, there are no margins or a NaN among them, or a probability is outside [0, 1].

    Examples:
        Three of four right means odds of 3 to 1: margins of 2·log 3 are twice too large.

        >>> fit_temperature(2 * torch.tensor(3.0).log() * torch.tensor([1.0, 1.0, 1.0, -1.0]))
        tensor(2.)
    """
    _check_vector(margins, "margins")
    m = margins.detach().double()
    p = torch.ones_like(m) if probability is None else probability.double()
    check_same_shape(margins=m, probability=p)
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError(f"expected probability in [0, 1], got {p.min():.4g} to {p.max():.4g}")
    if not bool((m != 0).any()):
        return margins.new_ones(())

    def slope(temperature: Tensor) -> Tensor:
        # Written with both tails, since σ(z) − 1 is lost to rounding where z is large.
        z = m / temperature
        return (m * ((1 - p) * torch.sigmoid(z) - p * torch.sigmoid(-z))).sum()

    low, high = m.new_tensor(TEMPERATURE_RANGE).log()
    for _ in range(60):  # halves ln(1e4) to below the resolution of a double
        middle = (low + high) / 2
        if bool(slope(middle.exp()) > 0):
            low = middle
        else:
            high = middle
    return ((low + high) / 2).exp().to(margins.dtype)
