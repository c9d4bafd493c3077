"""The contract of all uncertainty estimators on pooled features."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lit_vapo.functional import ensemble_estimate, fit_normaliser, normalise_members
from lit_vapo.types import RewardEstimate


class RewardHead(nn.Module, ABC):
    """Maps pooled features (B, H) to a `RewardEstimate`, and knows its own training loss.

    A subclass keeps every constructor argument as an attribute of the same name (so that a saved head can be built
    again), creates its parameters in `make_parameters`, and gives `rewards` and `loss`. Members leave `forward`
    normalised: each is centred and scaled on responses of the reference policy (`calibrate`), because a Bradley–Terry
    reward has neither an origin nor a unit, and a variance across members that disagree on those means nothing.

    Args:
        num_members: Number of members K.
    """

    reward_loc: Tensor
    reward_scale: Tensor
    reference_variance: Tensor
    calibrated: Tensor

    def __init__(self, num_members: int) -> None:
        super().__init__()
        if num_members < 1:
            raise ValueError(f"num_members: expected at least 1, got {num_members}")
        self.num_members = num_members
        self.hidden_size: int | None = None
        self.register_buffer("reward_loc", torch.zeros(num_members))
        self.register_buffer("reward_scale", torch.ones(num_members))
        self.register_buffer("reference_variance", torch.ones(()))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))

    def build(self, hidden_size: int) -> None:
        """Create the parameters for features of width `hidden_size`; called once, before any use."""
        self.hidden_size = hidden_size
        self.make_parameters(hidden_size)

    @abstractmethod
    def make_parameters(self, hidden_size: int) -> None:
        """Register the parameters; the features have width `hidden_size`."""

    @abstractmethod
    def rewards(self, features: Tensor) -> Tensor:
        """Raw rewards (B, K) of features (B, H), in each member's own unit (a difference is a log-odds)."""

    @abstractmethod
    def loss(self, chosen: Tensor, rejected: Tensor, margin: Tensor | None, example_ids: Tensor) -> Tensor:
        """Training loss, a scalar: *summed* over members, so that K does not change a member's learning rate.

        Args:
            chosen: Features (B, H) of the preferred responses.
            rejected: Features (B, H) of the other responses.
            margin: By how much the preference was stated (B,), in units of reward; `None` for zero.
            example_ids: Stable identity of each pair (B,), int64; bootstrap weights depend on it alone.
        """

    def forward(self, features: Tensor) -> RewardEstimate:
        """Estimate of the normalised reward: mean (B,), variance (B,) with ddof 1, members (B, K)."""
        members = normalise_members(self.rewards(features), self.reward_loc, self.reward_scale)
        return ensemble_estimate(members)

    @torch.no_grad()
    def calibrate(self, features: Tensor) -> None:
        """Fix each member's origin and unit, and the typical variance, on reference responses.

        Args:
            features: Features (N, H) of N >= 2 responses of the reference policy.

        Raises:
            ValueError: A member's reward is not finite or does not vary.
        """
        raw = self.rewards(features).float()
        loc, scale = fit_normaliser(raw)
        self.reward_loc.copy_(loc)
        self.reward_scale.copy_(scale)
        self.reference_variance.copy_(ensemble_estimate(normalise_members(raw, loc, scale)).variance.mean())
        self.calibrated.fill_(True)

    def linear_mean(self) -> tuple[Tensor, Tensor] | None:
        """Weight (H,) and bias () of the mean normalised reward if it is linear in the features, else `None`.

        A critic on the same features starts from it.
        """
        return None

    def init_args(self) -> dict[str, Any]:
        """The constructor arguments, read back from the attributes of the same names."""
        names = [name for name in inspect.signature(type(self).__init__).parameters if name != "self"]
        return {name: getattr(self, name) for name in names}
