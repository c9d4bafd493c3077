"""The critic: a value head on hidden states, and where these come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_vapo.models.pretrained import Pretrained, disable_dropout, load_backbone


@dataclass
class CriticSpec:
    """What the value head reads.

    Args:
        trunk: `reference`, hidden states of the frozen reference: they are there anyway, so the critic costs a
            matrix-vector product. `lora`, own adapters on the same base. `own`, a model of its own, trained.
        base: The model of an `own` trunk; `null` takes the policy's base.
        warm_start: Start from the mean reward head where it is linear and reads the same hidden states.
    """

    trunk: Literal["reference", "lora", "own"] = "reference"
    base: Pretrained | None = None
    warm_start: bool = True


class Critic(nn.Module):
    """Value of each position from its hidden state: V(s_t) = v·h_t + b, float32.

    Args:
        hidden_size: Width H of the hidden states.
        trunk: The critic's own model, or `None` if the states come from the policy's base.
    """

    def __init__(self, hidden_size: int, trunk: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.value_head = nn.Linear(hidden_size, 1)
        # Zero values make the first advantages plain rewards-to-go rather than noise.
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Values (B, T) of states (B, T, H)."""
        # Autocast would compute a matrix product in half precision whatever its input.
        with torch.autocast(states.device.type, enabled=False):
            values: Tensor = self.value_head(states.float()).squeeze(-1)
        return values

    @torch.no_grad()
    def warm_start(self, linear: tuple[Tensor, Tensor] | None) -> bool:
        """Start from the ensemble's mean reward, a weight (H,) and a bias (), if there is one; tell whether."""
        if linear is None or linear[0].shape != self.value_head.weight.shape[1:]:
            return False
        self.value_head.weight.copy_(linear[0][None])
        self.value_head.bias.copy_(linear[1][None])
        return True


def own_trunk(spec: CriticSpec, policy_base: Pretrained, depth: int | None = None) -> PreTrainedModel:
    """The trainable model of an `own` trunk, cut off after `depth` blocks.

    Raises:
        ValueError: The model is quantised.
    """
    base = spec.base or policy_base
    if base.quantization is not None:
        raise ValueError(f"model.critic.base: expected an unquantised model to train, got {base.quantization}")
    # Small updates of weights in bfloat16 would be rounded away.
    trunk = load_backbone(base, depth).float()
    disable_dropout(trunk)
    return trunk
