"""Origin, unit and typical variance of members: the one place where σ² gets its unit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_vapo.functional import ensemble_estimate, fit_normaliser, normalise_members


class Normaliser(nn.Module):
    """What makes members comparable: each is centred and scaled on responses of the reference policy.

    A Bradley–Terry reward has neither an origin nor a unit, and a variance across members that disagree on those means
    nothing.

    Args:
        num_members: Number of members K.

    Attributes:
        reward_loc: Origin of each member (K,), in its own unit.
        reward_scale: Unit of each member (K,): a standard deviation over the reference's responses.
        reference_variance: Mean of the variance over members on the reference's responses (), in these units squared.
        calibrated: Whether all this was measured ().
    """

    reward_loc: Tensor
    reward_scale: Tensor
    reference_variance: Tensor
    calibrated: Tensor

    def __init__(self, num_members: int) -> None:
        super().__init__()
        # The members that are there: all, or the one that is trained by itself.
        self.present = slice(None)
        self.register_buffer("reward_loc", torch.zeros(num_members))
        self.register_buffer("reward_scale", torch.ones(num_members))
        self.register_buffer("reference_variance", torch.ones(()))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))

    @property
    def unit(self) -> str:
        """What normalised rewards are measured in, in words."""
        return "standard deviations of the reference's rewards" if bool(self.calibrated) else "not calibrated"

    def normalise(self, rewards: Tensor) -> Tensor:
        """Rewards in standard deviations over the reference's responses (B, K)."""
        return normalise_members(rewards, self.reward_loc[self.present], self.reward_scale[self.present])

    @torch.no_grad()
    def fit(self, loc: Tensor, scale: Tensor) -> None:
        """Take origins (K,) and units (K,)."""
        self.reward_loc[self.present] = loc
        self.reward_scale[self.present] = scale

    @torch.no_grad()
    def measure(self, variance: Tensor) -> None:
        """Take the variance (N,) on the reference's responses: the end of a calibration."""
        self.reference_variance.copy_(variance.mean())
        self.calibrated.fill_(True)

    def fit_to(self, rewards: Tensor) -> None:
        """Fit origins, units and typical variance to raw rewards (N, K) of the reference's N >= 2 responses.

        Raises:
            ValueError: There are too few responses, or a reward is not finite.
        """
        self.fit(*fit_normaliser(rewards.float()))
        self.measure(ensemble_estimate(self.normalise(rewards)).variance)
