"""The Laplace approximation of Bayesian Bradley–Terry regression on fixed features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_vapo.types import FeaturePairs


class Posterior(NamedTuple):
    """A Gaussian over weights.

    Attributes:
        mode: `(H,)`, its mean.
        factor: `(H, H)`, with factor · factorᵀ = covariance.
    """

    mode: Tensor
    factor: Tensor


def laplace_preference(
    differences: Tensor,
    *,
    margin: Tensor | None = None,
    probability: Tensor | None = None,
    weights: Tensor | None = None,
    prior_precision: float = 1.0,
    start: Tensor | None = None,
    max_steps: int = 100,
) -> Posterior:
    """Gaussian posterior over the weights of a linear reward, given preferences.

        L(w) = Σ_b v_b·( −q_b·logσ(z_b) − (1−q_b)·logσ(−z_b) ) + λ/2·‖w‖²,   z_b = w·Δφ_b − margin_b
        mode = argmin L (Newton with halved steps);   covariance = ( λI + Σ_b v_b·p_b(1−p_b)·Δφ_bΔφ_bᵀ )⁻¹,  p = σ(z)

    Source: MacKay, "The evidence framework applied to classification networks" (1992), equation 11 in the form for
    differences of features; last layer only as in Kristiadi et al., arXiv 2002.10118. Computed in float64.

    Args:
        differences: `(B, H)`, Δφ = features of the chosen response minus those of the rejected one.
        margin: `(B,)`, as in `bradley_terry_loss`; None for 0.
        probability: `(B,)`, q, probability that chosen is the better one; None for 1.
        weights: `(B,)`, v, how often each pair counts, >= 0; None for 1.
        prior_precision: λ > 0.
        start: `(H,)`, where to begin; None for 0.
        max_steps: Most Newton steps; some ten are usual.

    Returns:
        The posterior, in the dtype of `differences`.

    Raises:
        ValueError: if a shape does not fit, the precision is not positive, or a feature is not finite.

    Examples:
        >>> posterior = laplace_preference(torch.tensor([[1.0], [-1.0]]))  # one vote each way
        >>> posterior.mode.item(), round(posterior.factor.item() ** 2, 4)  # 1 / (1 + 2/4)
        (0.0, 0.6667)
    """
    if differences.ndim != 2 or len(differences) == 0:
        raise ValueError(f"expected differences of shape (B, H) with B >= 1, got {tuple(differences.shape)}")
    if not prior_precision > 0:
        raise ValueError(f"expected prior_precision > 0, got {prior_precision}")
    if not bool(torch.isfinite(differences).all()):
        row = int((~torch.isfinite(differences)).any(1).nonzero()[0])
        raise ValueError(f"expected finite features, got NaN or infinity in pair {row}")
    x = differences.double()
    columns = []
    for name, value, default in (("margin", margin, 0.0), ("probability", probability, 1.0), ("weights", weights, 1.0)):
        column = x.new_full((len(x),), default) if value is None else value.double()
        if column.shape != x.shape[:1]:
            raise ValueError(f"expected {name} of shape ({len(x)},), got {tuple(column.shape)}")
        columns.append(column)
    shift, q, v = columns
    w = x.new_zeros(x.shape[1]) if start is None else start.double()

    def cost(w: Tensor) -> Tensor:
        z = x @ w - shift
        return (v * (-logsigmoid(z) + (1 - q) * z)).sum() + 0.5 * prior_precision * w.square().sum()

    def precision(w: Tensor) -> Tensor:
        p = torch.sigmoid(x @ w - shift)
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        return prior_precision * eye + x.T @ ((v * p * (1 - p))[:, None] * x)

    current = cost(w)
    for _ in range(max_steps):
        gradient = x.T @ (v * (torch.sigmoid(x @ w - shift) - q)) + prior_precision * w
        step = torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(precision(w)))[:, 0]
        length = 1.0
        # Far from the mode a full step may overshoot; the cost is convex, so a short enough one always helps.
        while cost(w - length * step) > current and length > 1e-6:
            length /= 2
        w = w - length * step
        before, current = current, cost(w)
        if before - current <= 1e-12 * before.abs():
            break
    # H = LLᵀ, so (L⁻¹)ᵀ is a factor of H⁻¹.
    lower = torch.linalg.cholesky(precision(w))
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    factor = torch.linalg.solve_triangular(lower, eye, upper=False).T
    return Posterior(w.to(differences.dtype), factor.to(differences.dtype))


def held_out_nll(train: FeaturePairs, held_out: FeaturePairs, prior_precision: float = 30.0) -> Tensor:
    """How badly features of some pairs predict others: NLL of the mode of `laplace_preference`.

        −mean_b q_b·logσ(z_b) + (1−q_b)·logσ(−z_b),   z_b = w·Δφ_b,   w the mode given `train`

    The mean is weighted by the pairs' own weights. Deterministic, so layers can be compared by it.

    Args:
        train: Pairs that the mode is fitted to, of features (B, H).
        held_out: Pairs that it is judged on.
        prior_precision: λ of the fit; the default suits hidden states after a final normalisation.

    Returns:
        `()`, in nats; log 2 is a coin.

    Examples:
        >>> from lit_vapo.types import PairLabels
        >>> labels = PairLabels(torch.zeros(1), torch.ones(1), torch.ones(1), torch.zeros(1, dtype=torch.long))
        >>> pair = FeaturePairs(torch.ones(1, 1), torch.zeros(1, 1), labels)
        >>> held_out_nll(pair, pair._replace(chosen=torch.zeros(1, 1)))
        tensor(0.6931)
    """
    labels = train.labels
    posterior = laplace_preference(
        (train.chosen - train.rejected).float(),
        margin=labels.margin,
        probability=labels.probability,
        weights=labels.weight,
        prior_precision=prior_precision,
    )
    z = (held_out.chosen - held_out.rejected).float() @ posterior.mode
    q, weight = held_out.labels.probability, held_out.labels.weight
    return -(weight * (logsigmoid(z) - (1 - q) * z)).sum() / weight.sum()
