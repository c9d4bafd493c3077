"""The critic: a value head on hidden states, and where these come from."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_vapo.models.exported import same_weights
from lit_vapo.models.pretrained import KEY, Pretrained, disable_dropout, load_backbone
from lit_vapo.models.settings import STRICT, read_settings
from lit_vapo.models.tensors import check_finite, read_tensors
from lit_vapo.models.weights import hushed

CONFIG_NAME, WEIGHTS_NAME, TRUNK_NAME = "critic.json", "critic.safetensors", "trunk"
HEAD = "value_head."


@dataclass
class CriticSpec:
    """What the value head reads.

    Args:
        trunk: `reference`, hidden states of the frozen reference: they are there anyway, so the critic costs a
            matrix-vector product. `lora`, own adapters on the same base. `own`, a model of its own, trained.
        base: The model of an `own` trunk; `null` takes the policy's base.
        warm_start: Start from the mean reward head where it is linear in the last token's state of the same model.
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
    """The trainable model of an `own` trunk, cut off after `depth` blocks: the policy's base, but never quantised.

    Raises:
        ValueError: Another model was chosen, and is quantised.
    """
    if spec.base is not None and spec.base.quantization is not None:
        raise ValueError(f"model.critic.base: expected an unquantised model to train, got {spec.base.quantization}")
    # Small updates of weights in bfloat16 would be rounded away.
    key = "model.critic.base.path" if spec.base else KEY
    trunk = load_backbone(replace(spec.base or policy_base, quantization=None), depth, key).float()
    disable_dropout(trunk)
    return trunk


class HiddenStates(NamedTuple):
    """Hidden states of a frozen model.

    Attributes:
        base: The model.
        layer: After this many blocks; `None` after the last.
    """

    base: Pretrained
    layer: int | None


class Reads(NamedTuple):
    """Which hidden states a critic reads.

    Attributes:
        trunk: As in `CriticSpec`.
        base: Path of the model they come from.
        layer: After this many blocks; `None` after the last.
    """

    trunk: str
    base: str
    layer: int | None

    def same(self, other: Reads) -> bool:
        """Whether two critics read the same states, before either was trained."""
        return (self.trunk, self.layer) == (other.trunk, other.layer) and same_weights(self.base, other.base)


class _ReadsFile(BaseModel):
    """What `critic.json` says: a `Reads`."""

    model_config = STRICT

    trunk: Literal["reference", "lora", "own"]
    base: str
    layer: Annotated[int, Field(ge=1)] | None


@hushed()
def save_critic(folder: Path, critic: Critic, adapters: dict[str, Tensor], reads: Reads) -> None:
    """Write a critic: value head, its adapters by name, its own trunk, and what it reads."""
    folder.mkdir(parents=True)
    head = {f"{HEAD}{n}": p.detach() for n, p in critic.value_head.state_dict().items()}
    save_file({**head, **adapters}, folder / WEIGHTS_NAME)
    if critic.trunk is not None:
        critic.trunk.save_pretrained(folder / TRUNK_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(reads._asdict(), indent=2) + "\n")


def saved_trunk(folder: Path, reads: Reads) -> Pretrained | None:
    """The own trunk of a saved critic that reads these states."""
    fits = _reads_same(folder, reads) and (folder / TRUNK_NAME / "config.json").is_file()
    return Pretrained(str((folder / TRUNK_NAME).resolve()), dtype="float32") if fits else None


@torch.no_grad()
def load_critic(folder: Path, critic: Critic, adapters: dict[str, nn.Parameter], reads: Reads) -> bool:
    """Take the weights of a saved critic, if there is one that reads these states and has these shapes; tell whether.

    An own trunk is read when it is made (`saved_trunk`).
    """
    if not _reads_same(folder, reads):
        return False
    own = {**{f"{HEAD}{n}": p for n, p in critic.value_head.named_parameters()}, **adapters}
    saved = read_tensors(folder / WEIGHTS_NAME)
    check_finite(saved, folder / WEIGHTS_NAME)
    if {n: p.shape for n, p in own.items()} != {n: p.shape for n, p in saved.items()}:
        return False
    for name, parameter in own.items():
        parameter.copy_(saved[name])
    return True


def _reads_same(folder: Path, reads: Reads) -> bool:
    path = folder / CONFIG_NAME
    return path.is_file() and reads.same(Reads(**read_settings(path, _ReadsFile).model_dump()))
