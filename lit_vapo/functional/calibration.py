"""Accuracy and calibration of preference predictions.

A margin is the score of the chosen response minus that of the rejected one, and the label is always 1: the
predicted probability of the label is sigmoid(margin). Margins `(B,)` give one number; margins `(B, K)` give
one for each member.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lit_vapo.functional.masked import check_same_shape


class ReliabilityCurve(NamedTuple):
    """Confidence against accuracy in bins of equal width.

    Attributes:
        confidence: `(bins,)`, mean confidence of the pairs in a bin; NaN where it is empty.
        accuracy: `(bins,)`, share of them that are right; NaN where it is empty.
        share: `(bins,)`, share of all pairs that lie in the bin; sums to 1.
    """

    confidence: Tensor
    accuracy: Tensor
    share: Tensor


def _check(x: Tensor, name: str = "margins") -> None:
    """Raise ValueError unless `x` is (B,) or (B, K) with B >= 1."""
    if x.ndim not in (1, 2) or x.shape[0] == 0:
        raise ValueError(f"expected {name} of shape (B,) or (B, K) with B >= 1, got {tuple(x.shape)}")


def preference_accuracy(margins: Tensor) -> Tensor:
    """Share of pairs in which the chosen response scores higher; a tie counts one half.

    Args:
        margins: `(B,)` or `(B, K)`, in units of reward.

    Returns:
        `()` or `(K,)`, in [0, 1].

    Raises:
        ValueError: if the shape is another or the batch is empty.

    Examples:
        >>> preference_accuracy(torch.tensor([2.0, -1.0, 0.0, 0.5]))
        tensor(0.6250)
    """
    _check(margins)
    return _correct(margins).mean(dim=0)


def preference_nll(margins: Tensor) -> Tensor:
    """Mean negative log-likelihood of the preferences, -log sigmoid(margin).

    Args:
        margins: `(B,)` or `(B, K)`, in units of reward.

    Returns:
        `()` or `(K,)`, in nats; log(2) for a coin flip.

    Raises:
        ValueError: if the shape is another or the batch is empty.
    """
    _check(margins)
    return softplus(-margins).mean(dim=0)


def brier(margins: Tensor) -> Tensor:
    """Brier score of the preferences, the mean of (1 - sigmoid(margin))^2.

    Source: Brier (1950), in the form for a binary event.

    Args:
        margins: `(B,)` or `(B, K)`, in units of reward.

    Returns:
        `()` or `(K,)`, in [0, 1]; 0.25 for a coin flip.

    Raises:
        ValueError: if the shape is another or the batch is empty.
    """
    _check(margins)
    return torch.sigmoid(-margins).square().mean(dim=0)


def expected_calibration_error(probabilities: Tensor, correct: Tensor, bins: int = 10) -> Tensor:
    """Expected calibration error over bins of equal width.

        ECE = Σ_b n_b / N * | mean correct in b - mean probability in b |

    Bins are [i / bins, (i + 1) / bins), the last one closed. Source: Naeini et al. (AAAI 2015); Guo et al.,
    arXiv 1706.04599, equation 3, where bins are open on the left instead.

    Args:
        probabilities: `(N,)` or `(N, K)`, predicted probability that the answer is correct, in [0, 1].
        correct: same shape, whether it was: bool, or a number in [0, 1] (one half for a tie).
        bins: number of bins >= 1.

    Returns:
        `()` or `(K,)`, in [0, 1].

    Raises:
        ValueError: if shapes differ, the batch is empty, bins < 1, or a probability is outside [0, 1] or NaN.

    Examples:
        >>> expected_calibration_error(torch.tensor([0.9, 0.9]), torch.tensor([True, False]))
        tensor(0.4000)
    """
    _check(probabilities, "probabilities")
    check_same_shape(probabilities=probabilities, correct=correct)
    if bins < 1:
        raise ValueError(f"expected bins >= 1, got {bins}")
    if not bool(((probabilities >= 0) & (probabilities <= 1)).all()):
        raise ValueError(
            f"expected probabilities in [0, 1], got {probabilities.min():.4g} to {probabilities.max():.4g}"
        )
    index = _bin_index(probabilities, bins)
    gap = correct.to(probabilities.dtype) - probabilities
    totals = probabilities.new_zeros(bins, *probabilities.shape[1:]).scatter_add(0, index, gap)
    return totals.abs().sum(dim=0) / probabilities.shape[0]


def preference_calibration_error(margins: Tensor, bins: int = 10) -> Tensor:
    """Expected calibration error of the preferred side: confidence sigmoid(|margin|) against being right.

    With the label always 1, the probability of the label itself cannot be calibrated bin by bin: whoever put
    the pair in order decided it. So what is asked is how often the member is right when it is, say, 80% sure
    of either side.

    Args:
        margins: `(B,)` or `(B, K)`, in units of reward.
        bins: number of bins >= 1 over [0, 1]; confidences fill the upper half.

    Returns:
        `()` or `(K,)`, in [0, 1].

    Raises:
        ValueError: if the shape is another, the batch is empty, or bins < 1.
    """
    _check(margins)
    return expected_calibration_error(torch.sigmoid(margins.abs()), _correct(margins), bins)


def reliability_curve(margins: Tensor, bins: int = 10) -> ReliabilityCurve:
    """Confidence against accuracy of the preferred side: what `preference_calibration_error` sums, bin by bin.

        ECE = Σ_b share_b · | accuracy_b − confidence_b |   over the bins that are not empty

    Args:
        margins: `(N,)`, in units of reward.
        bins: number of bins >= 1 over [0, 1]; confidences fill the upper half.

    Returns:
        ReliabilityCurve.

    Raises:
        ValueError: if the shape is another, there are no margins or a NaN among them, or bins < 1.

    Examples:
        >>> curve = reliability_curve(torch.tensor(3.0).log() * torch.tensor([1.0, 1.0, -1.0, 0.0]), bins=2)
        >>> curve.confidence[1], curve.accuracy[1], curve.share
        (tensor(0.6875), tensor(0.6250), tensor([0., 1.]))
    """
    if margins.ndim != 1 or margins.shape[0] == 0:
        raise ValueError(f"expected margins of shape (N,) with N >= 1, got {tuple(margins.shape)}")
    if bins < 1:
        raise ValueError(f"expected bins >= 1, got {bins}")
    if bool(torch.isnan(margins).any()):
        raise ValueError(f"expected margins without NaN, got {int(torch.isnan(margins).sum())} in {len(margins)}")
    confidence = torch.sigmoid(margins.abs())
    index = _bin_index(confidence, bins)
    columns = torch.stack([confidence, _correct(margins), torch.ones_like(confidence)])
    confidences, rights, counts = columns.new_zeros(3, bins).index_add(1, index, columns)
    return ReliabilityCurve(confidences / counts, rights / counts, counts / len(margins))


def _bin_index(probabilities: Tensor, bins: int) -> Tensor:
    """Which of `bins` bins of equal width over [0, 1] each probability lies in."""
    return (probabilities * bins).long().clamp(max=bins - 1)


def _correct(margins: Tensor) -> Tensor:
    """Return 1 where the margin is positive, 1/2 where it is zero, 0 where it is negative; NaN stays NaN."""
    return 0.5 * (torch.sign(margins) + 1)
