"""Preferences between responses of which people do not all think the same: a mean and a spread of each response.

Whoever judges a response y puts it at u ~ N(μ(y), τ²(y)), and prefers what stands higher (Thurstone, 1927). So
preferences tell two things: by how much a response is better, and how much people differ about it.

    P(a ≻ b) = Φ( (μ_a − μ_b) / √(τ_a² + τ_b²) )

Source: Fang, Jiang, Zhang, Zhou, arXiv 2605.11865 (a Gaussian reward model), where two labels of single responses
serve as anchors. Our data has none; what stands in their place is said in `noisy_log_odds`.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.special import log_ndtr

from lit_vapo.functional.masked import check_same_shape

# τ² of a response with log-noise 0. Two of these make Φ(x/√(8/π)), the Gaussian with the slope of the logistic at 0.
TYPICAL_NOISE = 4 / math.pi


def noise_variance(log_noise: Tensor) -> Tensor:
    """τ² of responses, 4/π · exp(s), in units of (raw) reward squared.

    Args:
        log_noise: `(…)`, s.
    """
    return TYPICAL_NOISE * log_noise.exp()


def noisy_log_odds(chosen: Tensor, rejected: Tensor, chosen_noise: Tensor, rejected_noise: Tensor) -> Tensor:
    """Log-odds that the first of two responses is preferred.

        logit Φ(z) = log Φ(z) − log Φ(−z),    z = (μ_c − μ_r) / √(τ_c² + τ_r²),    τ² = 4/π · exp(s)

    With s = 0 everywhere that is μ_c − μ_r to first order, as in Bradley–Terry, with the tails of a normal
    distribution.

    **What preferences leave open.** (μ, τ) and (c·μ + b, c·τ) with c > 0 say the same of every pair. Between five
    responses or more nothing else is open (the Jacobian of z over all pairs has rank 2n − 2). So two anchors fix
    everything, an origin and a unit. In training a penalty on s² holds the unit: along c the likelihood does not
    change, and the penalty is least where the mean of s is zero. Afterwards the reference's responses are the anchors:
    μ is centred and scaled on them, and τ divided by the same unit, which takes out whatever b and c were.

    Args:
        chosen: `(…)`, μ of the first response.
        rejected: `(…)`, μ of the second.
        chosen_noise: `(…)`, s of the first response.
        rejected_noise: `(…)`, s of the second.

    Returns:
        `(…)`.

    Raises:
        ValueError: if the shapes differ.

    Examples:
        >>> import torch
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> noisy_log_odds(one, zero, zero, zero)  # z = √(π/8) = 0.6267, Φ(z) = 0.7346
        tensor([1.0179])
        >>> noisy_log_odds(one, zero, zero + 10, zero + 10)  # who asks twice hears both
        tensor([0.0067])
    """
    check_same_shape(chosen=chosen, rejected=rejected, chosen_noise=chosen_noise, rejected_noise=rejected_noise)
    z = (chosen - rejected) * (noise_variance(chosen_noise) + noise_variance(rejected_noise)).rsqrt()
    return log_ndtr(z) - log_ndtr(-z)
