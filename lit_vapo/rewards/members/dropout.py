"""Dropout as an approximate posterior: one head, scored under many masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_vapo.functional import example_uniforms
from lit_vapo.ranges import OpenUnitInterval, PositiveInt, Smoothing, check_ranges
from lit_vapo.rewards.members.base import RewardHead


class McDropout(RewardHead):
    """One head whose members are K dropout masks (Monte Carlo dropout, Gal and Ghahramani 1506.02142).

    Each training step draws a new mask for each pair, the same for both of its responses: a member is one network,
    and compares two responses as one. A mask depends on the step and the pair, not on which process has the pair.
    Scoring uses K masks that depend on the seed alone. So scores are reproducible, member k is the same network for all
    responses, and a margin's variance is well defined; the source draws new masks at each pass instead. All passes
    share one pass of the backbone.

    Args:
        num_members: Number of masks K.
        dropout: Share of the head's inputs that a mask drops, in (0, 1).
        hidden_width: Width of a hidden layer, whose outputs are then dropped in place of the features; `null` for a
            linear head.
        label_smoothing: Share of preferences taken to be stated the wrong way round, in [0, 0.5).
        centering: Weight of the penalty (r_chosen + r_rejected)², which keeps rewards near zero.
        seed: Seed of initialisation and masks.
        moderated: Shrink σ² of each response to the typical one, as far as K − 1 degrees of freedom leave it unknown.

    Raises:
        ValueError: `dropout` is not between 0 and 1.
    """

    masks: Tensor

    def __init__(
        self,
        num_members: PositiveInt = 10,
        dropout: OpenUnitInterval = 0.1,
        hidden_width: int | None = None,
        label_smoothing: Smoothing = 0.0,
        centering: float = 0.0,
        seed: int = 0,
        moderated: bool = True,
    ) -> None:
        # Every mask is of the same weights: there is one set of them to bootstrap, so there is nothing to vary.
        super().__init__(num_members, False, label_smoothing, centering, seed, moderated)
        check_ranges(McDropout, locals())
        self.dropout = dropout
        self.hidden_width = hidden_width

    def make_parameters(self, hidden_size: int) -> None:
        """Draw the weights and the K masks."""
        width = self.hidden_width or hidden_size
        self.weight = nn.Parameter(self.draw((width,), width, stream=0)[0])
        if self.hidden_width is not None:
            self.hidden_weight = nn.Parameter(self.draw((self.hidden_width, hidden_size), hidden_size, stream=1)[0])
            self.hidden_bias = nn.Parameter(torch.zeros(self.hidden_width))
        drawn = [torch.rand(width, generator=self.generator(k, 2)) for k in range(self.num_members)]
        self.register_buffer("masks", (torch.stack(drawn) >= self.dropout) / (1 - self.dropout))

    def rewards(self, features: Tensor) -> Tensor:
        """Raw rewards (B, K) under the K masks, of features (B, H)."""
        with torch.autocast(features.device.type, enabled=False):
            return self._inputs(features) @ (self.masks * self.weight).T

    def training_rewards(self, features: Tensor, example_ids: Tensor) -> Tensor:
        """Raw rewards (2B, 1) of pairs, chosen before rejected, under one new mask for each pair."""
        inputs = self._inputs(features)
        with torch.autocast(features.device.type, enabled=False):
            step = int(torch.randint(2**62, ()))
            kept = example_uniforms(example_ids, inputs.shape[1], step) >= self.dropout
            return (inputs * kept.repeat(2, 1) / (1 - self.dropout)) @ self.weight[:, None]

    def _inputs(self, features: Tensor) -> Tensor:
        features = features.float()
        if self.hidden_width is None:
            return features
        with torch.autocast(features.device.type, enabled=False):
            return torch.tanh(features @ self.hidden_weight.T + self.hidden_bias)

    def linear_members(self) -> tuple[Tensor, Tensor] | None:
        """Weights and biases of the normalised masked heads, if linear."""
        if self.hidden_width is not None:
            return None
        weight = self.masks * self.weight / self.reward_scale[:, None]
        return weight.detach().clone(), -self.reward_loc / self.reward_scale
