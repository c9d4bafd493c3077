"""The Bradley-Terry loss of an ensemble of reward models."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_vapo.functional.masked import check_same_shape


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    probability: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of the preferences under each member, one loss per member.

        z = chosen - rejected - margin
        q = (1 - s) * probability + s * (1 - probability)
        loss = 1/B * sum_b weights_b * ( -q_b * logsigmoid(z_b) - (1 - q_b) * logsigmoid(-z_b)
                                         + centering * (chosen_b + rejected_b)^2 )

    Source: Bradley & Terry (1952); as a loss Ouyang et al., arXiv 2203.02155, equation 1; margin Touvron et
    al., arXiv 2307.09288, equation 2; smoothing Mitchell, "A note on DPO with noisy preferences" (2023);
    centering Eisenstein et al., arXiv 2312.09244.

    The weighted sum is divided by B, not by the sum of the weights, so weighting an example by n gives the
    same sum as repeating it n times (the same loss up to the 1/B), and a member whose bootstrap drew fewer
    examples takes a smaller step. Callers sum over members: a mean would divide each member's learning rate
    by K.

    Args:
        chosen: `(B, K)`, scores of the preferred responses, in units of reward (logits of preference).
        rejected: `(B, K)`, scores of the others.
        margin: `(B,)`, by how much chosen should beat rejected, in units of reward; None for 0.
        probability: `(B,)`, probability that chosen is the better one, in [0, 1]; 0.5 for a tie; None for 1.
        weights: `(B, K)`, non-negative weight of each example for each member, e.g. bootstrap counts; None
            for 1.
        label_smoothing: s, the assumed probability in [0, 0.5) that a label is flipped.
        centering: coefficient >= 0 that draws chosen + rejected to zero; it fixes the shift that preferences
            leave free.

    Returns:
        `(K,)`, in nats.

    Raises:
        ValueError: if shapes do not fit, the batch is empty, or an option is out of its range.

    Examples:
        >>> bradley_terry_loss(torch.zeros(3, 2), torch.zeros(3, 2))  # a coin flip: log(2)
        tensor([0.6931, 0.6931])
    """
    if chosen.ndim != 2 or chosen.shape[0] == 0:
        raise ValueError(f"expected chosen of shape (B, K) with B >= 1, got {tuple(chosen.shape)}")
    check_same_shape(chosen=chosen, rejected=rejected)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"expected label_smoothing in [0, 0.5), got {label_smoothing}")
    if not centering >= 0.0:
        raise ValueError(f"expected centering >= 0, got {centering}")
    logits = chosen - rejected
    if margin is not None:
        if margin.shape != chosen.shape[:1]:
            raise ValueError(f"expected margin of shape ({chosen.shape[0]},), got {tuple(margin.shape)}")
        logits = logits - margin[:, None]
    losses = -logsigmoid(logits)
    if probability is not None and probability.shape != chosen.shape[:1]:
        raise ValueError(f"expected probability of shape ({chosen.shape[0]},), got {tuple(probability.shape)}")
    if probability is not None or label_smoothing > 0.0:
        stated = torch.ones_like(logits[:, 0]) if probability is None else probability
        other = 1 - torch.lerp(stated, 1 - stated, label_smoothing)
        # -logsigmoid(-z) = z - logsigmoid(z)
        losses = losses + other[:, None] * logits
    if centering > 0.0:
        losses = losses + centering * (chosen + rejected).square()
    if weights is not None:
        check_same_shape(chosen=chosen, weights=weights)
        losses = losses * weights
    return losses.sum(dim=0) / losses.shape[0]
