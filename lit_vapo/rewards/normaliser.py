"""Origin, unit and typical variance of members: the one place where σ² gets its unit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_vapo.functional import ensemble_estimate, fit_normaliser, normalise_members


def birthplace() -> torch.device:
    """Where members begin: on the CPU, on which their numbers are drawn, so that they are the same everywhere.

    Lightning builds models within a block for the device of the run; they move there later. Who asks for shapes alone
    (`meta`) gets no more.
    """
    return torch.device("meta" if torch.get_default_device().type == "meta" else "cpu")


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
        with birthplace():
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
        """Take the variance (N,) on the reference's responses: the end of a calibration.

        Raises:
            ValueError: It is not finite.
        """
        mean = variance.mean()
        if not torch.isfinite(mean):
            raise ValueError(f"expected a finite variance of members on the reference's responses, got {float(mean)}")
        self.reference_variance.copy_(mean)
        self.calibrated.fill_(True)

    def fit_to(self, rewards: Tensor, applies: Tensor | None = None) -> None:
        """Fit origins, units and typical variance to raw rewards (N, K) of the reference's N >= 2 responses.

        Args:
            rewards: The raw rewards.
            applies: To which responses they apply (N,); to all, if not given. Elsewhere members are not uncertain: the
                typical variance is the mean over all responses, as in a sum of sources.

        Raises:
            ValueError: There are too few responses, a reward is not finite, or a member has no unit, since it gives all
                responses one reward.
        """
        rewards = rewards.float()
        applies = torch.ones(len(rewards), dtype=torch.bool, device=rewards.device) if applies is None else applies
        known = rewards[applies]
        loc, scale = fit_normaliser(known)
        same = (known == known[:1]).all(0)
        if bool(same.any()):
            k = int(same.nonzero()[0, 0])
            raise ValueError(
                f"member {k}: expected different rewards of the reference's {len(known)} responses, from which its "
                f"unit would follow, got {float(known[0, k])} for all. Leave it its own unit (`normalise: false`), "
                "or calibrate on prompts that it tells apart."
            )
        self.fit(loc, scale)
        self.measure(torch.where(applies, ensemble_estimate(self.normalise(rewards)).variance, 0.0))
