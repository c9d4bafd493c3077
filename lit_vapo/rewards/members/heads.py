"""An ensemble of reward heads on one backbone, evaluated in one matrix product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_vapo.ranges import PositiveInt, Smoothing
from lit_vapo.rewards.members.base import RewardHead


class HeadEnsemble(RewardHead):
    """K linear or one-hidden-layer heads that share a backbone and differ by initialisation and bootstrap.

    Each member is drawn from N(0, 1/√(H+1)) and sees each pair a Poisson(1) number of times, a bootstrap that
    depends on (seed, member, pair) alone and therefore not on batching, order or number of processes. All members
    are one parameter and one matrix product, so K hardly matters to the time of a step.

    Args:
        num_members: Number of members K. A variance needs at least 2, and is known to ±√(2/(K − 1)): with ten members
            that is ±47%, more than it differs between responses.
        hidden_width: Width of a hidden layer per member; `null` for linear heads.
        bootstrap: Weight pairs by Poisson(1) counts per member; if off, members differ by initialisation only.
        label_smoothing: Share of preferences taken to be stated the wrong way round, in [0, 0.5).
        centering: Weight of the penalty (r_chosen + r_rejected)², which keeps rewards near zero.
        seed: Seed of initialisation and bootstrap.
        moderated: Shrink σ² of each response to the typical one, as far as K − 1 degrees of freedom leave it unknown.
    """

    def __init__(
        self,
        num_members: PositiveInt = 100,
        hidden_width: int | None = None,
        bootstrap: bool = True,
        label_smoothing: Smoothing = 0.0,
        centering: float = 0.0,
        seed: int = 0,
        moderated: bool = True,
    ) -> None:
        super().__init__(num_members, bootstrap, label_smoothing, centering, seed, moderated)
        self.hidden_width = hidden_width

    def make_parameters(self, hidden_size: int) -> None:
        """Draw the members' weights."""
        width = self.hidden_width or hidden_size
        self.weight = nn.Parameter(self.draw((width,), width, stream=0))
        # A preference cannot tell what it is: its gradient would be nothing but rounding, which Adam turns into steps.
        self.bias = nn.Parameter(torch.zeros(self.num_members), requires_grad=self.centering > 0)
        if self.hidden_width is not None:
            self.hidden_weight = nn.Parameter(self.draw((self.hidden_width, hidden_size), hidden_size, stream=1))
            self.hidden_bias = nn.Parameter(torch.zeros(self.num_members, self.hidden_width))

    def rewards(self, features: Tensor) -> Tensor:
        """Raw rewards (B, K) of features (B, H), computed in float32, under autocast too."""
        features = features.float()
        with torch.autocast(features.device.type, enabled=False):
            if self.hidden_width is None:
                return torch.addmm(self.bias, features, self.weight.T)
            hidden = torch.einsum("bh,kwh->bkw", features, self.hidden_weight) + self.hidden_bias
            return torch.einsum("bkw,kw->bk", torch.tanh(hidden), self.weight) + self.bias

    def linear_members(self) -> tuple[Tensor, Tensor] | None:
        """Weights and biases of the normalised linear heads: (w_k·φ + b_k − loc_k) / scale_k."""
        if self.hidden_width is not None:
            return None
        weight = self.weight / self.reward_scale[:, None]
        bias = (self.bias - self.reward_loc) / self.reward_scale
        return weight.detach().clone(), bias.detach().clone()
