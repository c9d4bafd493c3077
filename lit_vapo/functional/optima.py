"""Many optima at once: the exact policies of many estimated rewards, each on one prompt with n responses.

Source: Banerjee, Saha, Gopalan, "Towards Reliable, Uncertainty-Aware Alignment", arXiv 2507.15906.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_STEPS = 200


def optimal_policies(reward: Tensor, ref_probs: Tensor, price: Tensor) -> Tensor:
    """The policies that maximise E_π[R] - D_p(π || π0) for price p = β * w, one for each row.

        π*(y) = π0(y) * exp( (R(y) - c) / p(y) ),    c such that it sums to 1

    As `optimal_policy`, for a batch. log Σ_y π0 exp((R - c) / p) is convex and falling in c, so Newton's steps from
    its left climb to the zero without passing it. They start at c = E_π0[R/p] / E_π0[1/p], where by Jensen's
    inequality it is not negative; for a constant price the first step is exact.

    Args:
        reward: `(..., n)`, R, in units of reward.
        ref_probs: `(n,)`, π0 > 0, summing to 1.
        price: broadcasts with `reward`, β * w > 0, in units of reward per nat.

    Returns:
        The broadcast shape, float64; each row sums to 1.

    Raises:
        ValueError: if an entry is not finite, π0 is no distribution, or a price is not positive.

    Example:
        >>> pi = optimal_policies(torch.tensor([[1.0, 0.0]]), torch.tensor([0.5, 0.5]), torch.ones(1, 1))
        >>> [round(p, 4) for p in pi[0].tolist()]  # sigmoid(1) = 0.7311
        [0.7311, 0.2689]
    """
    r, p0, p = reward.double(), ref_probs.double(), price.double()
    if not bool((p0 > 0).all()) or abs(float(p0.sum()) - 1.0) > 1e-4:
        raise ValueError(f"expected ref_probs > 0 that sum to 1, got {ref_probs.tolist()}")
    if not bool((p > 0).all() and torch.isfinite(p).all()):
        raise ValueError(f"expected finite prices > 0, got one of {float(p.min())} and one of {float(p.max())}")
    if not bool(torch.isfinite(r).all()):
        raise ValueError("expected rewards with finite entries, got NaN or infinity among them")
    log_p0 = (p0 / p0.sum()).log()
    slope = 1 / p.expand(torch.broadcast_shapes(r.shape, p.shape))
    r = r - r.amax(-1, keepdim=True)
    c = ((p0 * slope * r).sum(-1) / (p0 * slope).sum(-1))[..., None]
    for _ in range(MAX_STEPS):
        logits = log_p0 + (r - c) * slope
        excess = logits.logsumexp(-1, keepdim=True)
        if bool((excess.abs() <= 1e-12).all()):
            break
        c = c + excess / (logits.softmax(-1) * slope).sum(-1, keepdim=True)
    return torch.softmax(log_p0 + (r - c) * slope, dim=-1)


def policy_kl(policy: Tensor, ref_probs: Tensor) -> Tensor:
    """KL divergence of each row's policy from the reference, Σ_y π log(π/π0) - π + π0.

    Args:
        policy: `(..., n)`, each row a distribution.
        ref_probs: `(n,)`, π0 > 0.

    Returns:
        `(...)`, in nats, >= 0. The terms -π + π0 sum to zero, and keep a small divergence from rounding below it.
    """
    return (torch.xlogy(policy, policy / ref_probs) - policy + ref_probs).sum(-1).clamp_min(0)
