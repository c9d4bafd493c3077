"""Members whose variance is shrunk to the typical one, as far as their number leaves it unknown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lit_vapo.functional import ensemble_estimate, fit_variance_prior, moderated_variance, shrinkage
from lit_vapo.rewards.normaliser import Normaliser, birthplace
from lit_vapo.types import RewardEstimate


class ModeratedNormaliser(Normaliser):
    """A normaliser that knows how variances differ over the reference's responses (`functional/moderation.py`).

    Args:
        num_members: Number of members K.

    Attributes:
        typical_variance: s0², what a variance is shrunk to (), in units of the reference's rewards squared.
        shrinkage: Share of it in a variance (): 0 where variances stay as they come, 1 where all are alike.
    """

    typical_variance: Tensor
    shrinkage: Tensor

    def __init__(self, num_members: int) -> None:
        super().__init__(num_members)
        with birthplace():
            self.register_buffer("typical_variance", torch.ones(()))
            self.register_buffer("shrinkage", torch.zeros(()))

    def estimate(self, rewards: Tensor) -> RewardEstimate:
        """Estimate of the normalised reward from raw rewards (B, K): mean, moderated variance (B,), members (B, K)."""
        found = ensemble_estimate(self.normalise(rewards))
        return found._replace(variance=moderated_variance(found.variance, self.typical_variance, self.shrinkage))

    @torch.no_grad()
    def moderate(self, rewards: Tensor) -> None:
        """Fit the typical variance and its share to raw rewards (N, K) of the reference's responses.

        Origins and units are fitted before. One member alone has no variance, and nothing to shrink.
        """
        degrees = rewards.shape[1] - 1
        if degrees > 0:
            prior = fit_variance_prior(ensemble_estimate(self.normalise(rewards)).variance, degrees)
            self.typical_variance.copy_(prior.typical)
            self.shrinkage.copy_(shrinkage(degrees, prior))


def check_moderation(weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a typical variance, or a share of it, that makes no sense.

    Args:
        weights: What was read.
        path: From where, for the message.

    Raises:
        ValueError: The variance is below 0, or the share outside of [0, 1].
    """
    typical, share = (float(weights[name]) for name in ("typical_variance", "shrinkage"))
    if typical < 0:
        raise ValueError(f"{path}: expected typical_variance of at least 0, got {typical}")
    if not 0 <= share <= 1:
        raise ValueError(f"{path}: expected shrinkage in [0, 1], got {share}")
