"""Best-of-n: the response that a reward ranks highest among n, as a policy to compare with.

P counts prompts, N the responses drawn to each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_vapo.functional.masked import check_same_shape


def best_of_n(ranking: Tensor, values: Tensor) -> Tensor:
    """Expected value of the response that ranks highest among n of the N drawn, for n = 1 … N.

        E[V of the best of n] = Σ_r C(r − 1, n − 1) / C(N, n) · V_(r)

    V_(r) is the value of the response of rank r, the highest ranking one having rank N: it is the best of a subset of
    n where the other n − 1 are among the r − 1 below it. The mean over all subsets without replacement, and so
    unbiased for n independent draws. Responses that rank equally have no order; we take the expected value over their
    orders, in which each of them has the mean value of its group.

    Source: Nakano et al., arXiv 2112.09332, appendix I, as used by Gao et al., arXiv 2210.10760.

    Args:
        ranking: `(P, N)`, what a response is chosen by, e.g. the ensemble's mean; any unit.
        values: `(P, N)`, what the chosen response is worth, e.g. by a judge; `ranking` itself for the expected maximum.

    Returns:
        `(P, N)`, column n − 1 for the best of n, in units of `values`. The first column is the mean of a row.

    Raises:
        ValueError: if shapes differ or are no (P, N) with P, N >= 1, or there is a NaN in `ranking`.

    Examples:
        Of the three pairs, two contain the first response and one does not.

        >>> best_of_n(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[6.0, 0.0, 3.0]]))
        tensor([[3., 5., 6.]])
    """
    check_same_shape(ranking=ranking, values=values)
    if ranking.ndim != 2 or 0 in ranking.shape:
        raise ValueError(f"expected ranking of shape (P, N) with P, N >= 1, got {tuple(ranking.shape)}")
    if bool(torch.isnan(ranking).any()):
        raise ValueError(f"expected ranking without NaN, got {int(torch.isnan(ranking).sum())}")
    ranked, order = ranking.sort(dim=1)
    new = torch.ones_like(ranked, dtype=torch.bool)
    new[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    group = new.flatten().cumsum(0) - 1
    worth = values.gather(1, order).double().flatten()
    sums = worth.new_zeros(int(group[-1]) + 1).scatter_add(0, group, worth)
    worth = (sums / group.bincount())[group].view_as(ranked)
    return (worth @ _shares(ranking.shape[1]).to(worth).T).to(values.dtype)


def _shares(size: int) -> Tensor:
    """C(r − 1, n − 1) / C(N, n) for n and r from 1 to N (N, N).

    The share of r = N is n/N, and that of r − 1 is the share of r times (r − n)/(r − 1); the binomials themselves
    outgrow a double.
    """
    rank = torch.arange(1, size + 1, dtype=torch.float64)
    ratios = (rank - rank[:, None]).clamp(min=0)[:, 1:] / (rank[1:] - 1)
    last = (rank / size)[:, None]
    return torch.cat([last, ratios.flip(1)], dim=1).cumprod(dim=1).flip(1)


def best_of_n_kl(n: Tensor) -> Tensor:
    """Upper bound log n − (n − 1)/n of the KL divergence of the best of n from the policy that drew them.

    Exact where no two of the n are ever the same response, and too large where they may be. Source: Beirami et al.,
    arXiv 2401.01879.

    Args:
        n: any shape, how many responses were drawn, >= 1.

    Returns:
        Same shape, in nats.

    Raises:
        ValueError: if some n is below 1.

    Examples:
        >>> best_of_n_kl(torch.tensor([1, 2, 4]))
        tensor([0.0000, 0.1931, 0.6363])
    """
    if bool((n < 1).any()):
        raise ValueError(f"expected n >= 1, got {n.min()}")
    return torch.log(n) - (n - 1) / n
