"""K sets of low-rank adapters on one frozen backbone, trained and scored together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_vapo.functional import nuclear_diversity
from lit_vapo.models.pretrained import plain_layers
from lit_vapo.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Smoothing, check_ranges
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.types import Adapter, PairLabels


class LoraEnsemble(RewardHead):
    """K adapters with a linear head each, on one backbone (fp32, bf16, 8-bit or 4-bit) and in one run.

    The backbone is a decoder whose blocks get their masks with the batch in front: Llama, Qwen, Mistral, Mixtral,
    Gemma, Phi, Falcon, GPT-NeoX, GPT-2 and their like. Bloom and MPT, whose masks have the heads there, are refused.

    Below the lowest adapted block all members see the same states, so that part of the backbone runs once. There the
    batch is repeated K times, and each adapted layer y = Wx + α/r·B_k·A_k·x adds the update of all members by two
    grouped matrix products. A member differs from the others by the initialisation of adapters and head and by
    the bootstrap. In training no member reads the pairs that its bootstrap leaves out.

    Adapters: 2106.09685. Diversity of an ensemble of them: 2401.00243, which maximises the nuclear norm of the members'
    adapters side by side; here it is taken relative to the Frobenius norm, so that larger weights alone gain nothing.

    Args:
        num_members: Number of members K. A variance needs at least 2.
        rank: Rank r of an update.
        alpha: An update is scaled by alpha / rank.
        target_modules: Names of the linear layers to adapt, or `all-linear`.
        top_layers: Adapt only this many of the topmost blocks; `null` adapts all. The rest runs once for all members.
        diversity: Weight of the nuclear-norm diversity, in nats per member; 0 leaves it out.
        bootstrap: Weight pairs by Poisson(1) counts per member; if off, members differ by initialisation only.
        label_smoothing: Share of preferences taken to be stated the wrong way round, in [0, 0.5).
        centering: Weight of the penalty (r_chosen + r_rejected)², which keeps rewards near zero.
        seed: Seed of initialisation and bootstrap.
        moderated: Shrink σ² of each response to the typical one, as far as K − 1 degrees of freedom leave it unknown.

    Raises:
        ValueError: A number is out of its range.
    """

    shares_features = False

    def __init__(
        self,
        num_members: PositiveInt = 4,
        rank: PositiveInt = 8,
        alpha: PositiveFloat = 16.0,
        target_modules: str | list[str] = "all-linear",
        top_layers: int | None = None,
        diversity: NonNegativeFloat = 0.0,
        bootstrap: bool = True,
        label_smoothing: Smoothing = 0.0,
        centering: float = 0.0,
        seed: int = 0,
        moderated: bool = True,
    ) -> None:
        super().__init__(num_members, bootstrap, label_smoothing, centering, seed, moderated)
        check_ranges(LoraEnsemble, locals())
        self.rank = rank
        self.alpha = alpha
        self.target_modules = target_modules
        self.top_layers = top_layers
        self.diversity = diversity
        self.lora_a = nn.ParameterDict()
        self.lora_b = nn.ParameterDict()
        self.active = False
        self._rows = 0

    def make_parameters(self, hidden_size: int) -> None:
        """Draw the heads; the adapters are made when the backbone is there."""
        # No bias: a preference cannot tell what it is.
        self.weight = nn.Parameter(self.draw((hidden_size,), hidden_size, stream=0))

    # The backbone.

    def attach(self, backbone: nn.Module, blocks: nn.ModuleList) -> nn.Module:
        """Make adapters for the backbone's layers, and hang them in.

        Raises:
            ValueError: There are fewer blocks than `top_layers`, no such layers, or masks of another kind.
        """
        if type(backbone).__name__.startswith(("Bloom", "Mpt")):
            raise ValueError(f"LoraEnsemble: expected masks with the batch in front, got {type(backbone).__name__}")
        top = len(blocks) if self.top_layers is None else self.top_layers
        if not 1 <= top <= len(blocks):
            raise ValueError(f"head.top_layers: expected 1 … {len(blocks)}, got {self.top_layers}")
        adapted = list(blocks)[len(blocks) - top :]
        for block in adapted:
            block.register_forward_pre_hook(self._spread(first=block is adapted[0]), with_kwargs=True)
        # By their own names, whoever else has hung adapters in.
        names = {module: name for name, module in plain_layers(backbone).items()}
        linear = [(n, m) for block in adapted for n, m in plain_layers(block).items() if _is_linear(m)]
        found = [m for n, m in linear if self._is_target(n)]
        there = {n.rpartition(".")[2] for n, _ in linear}
        missing = [] if self.target_modules == "all-linear" else sorted(set(self._wanted()) - there)
        if missing or not found:
            raise ValueError(f"head.target_modules: expected each to be one of {sorted(there)}, got {missing}")
        for stream, module in enumerate(found, start=1):
            key = _key(names[module])
            inputs, outputs = _sizes(module)
            if key not in self.lora_a:
                # N(0, 1/√(in+1)) for A and zeros for B: a member starts as the backbone itself.
                self.lora_a[key] = nn.Parameter(self.draw((self.rank, inputs), inputs, stream=stream))
                self.lora_b[key] = nn.Parameter(torch.zeros(self.num_members, outputs, self.rank))
            module.register_forward_hook(self._update(key))
        device = next(backbone.parameters()).device
        for parameter in (*self.lora_a.values(), *self.lora_b.values()):
            parameter.data = parameter.data.to(device)
        return backbone

    def passes(self, backbone: nn.Module) -> Iterator[nn.Module]:
        """The backbone, once, with all members' adapters in place."""
        with self.in_place():
            yield backbone

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A block in which all members' adapters are in place."""
        self.active = True
        try:
            yield
        finally:
            self.active = False

    @contextmanager
    def learning_from(self, labels: PairLabels) -> Iterator[None]:
        """A block in which no member reads pairs that its bootstrap has left out, as far as others leave out as many.

        Of the rows of chosen and rejected responses, `rows` has those that the members read, one member after another:
        each the pairs that count for it, filled up to the member with the most.
        """
        counted = self.pair_weights(labels, self.num_members) > 0
        pairs, most = len(counted), max(1, int(counted.sum(0).max()))
        # States of as many rows as the batch would be taken for those of the batch.
        if self.num_members > 1 and most < pairs and self.num_members * most != pairs:
            first = (~counted).T.byte().argsort(dim=1, stable=True)[:, :most]
            self.rows = torch.cat([first, first + pairs], dim=1).flatten()
        try:
            yield
        finally:
            self.rows = None

    def join(self, outputs: list[Tensor]) -> Tensor:
        """Features (B, K, H)."""
        (features,) = outputs
        if self.num_members == 1:
            return features[:, None]
        if self.rows is not None:
            members = torch.arange(self.num_members, device=features.device).repeat_interleave(
                len(self.rows) // self.num_members
            )
            empty = features.new_zeros(self._rows, self.num_members, features.shape[-1])
            return empty.index_put((self.rows, members), features)
        if features.ndim != 3:
            raise ValueError(
                f"expected states of {self.num_members} members, got those of the backbone alone: is this the backbone "
                "that the adapters were attached to?"
            )
        return features

    def _is_target(self, name: str) -> bool:
        return self.target_modules == "all-linear" or name.rpartition(".")[2] in self._wanted()

    def _wanted(self) -> list[str]:
        return [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules

    def _spread(self, first: bool) -> Callable[..., tuple[Any, Any] | None]:
        """A hook that repeats what a block gets once for each member; its states are repeated by the first."""

        def hook(block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            if not self.active or self.num_members == 1:
                return None
            if first:
                self._rows = (args[0] if args else kwargs["hidden_states"]).shape[0]
            return self._repeat(args), {key: self._repeat(value) for key, value in kwargs.items()}

        return hook

    def _repeat(self, value: Any) -> Any:
        # Masks, rotations and (before the first block) states have the rows of the batch in front; what is
        # broadcast over the batch has 1 there, and what came from an adapted block K times as many.
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == self._rows:
            if self.rows is not None:
                return value[self.rows]
            return value.repeat(self.num_members, *[1] * (value.ndim - 1))
        return type(value)(self._repeat(x) for x in value) if isinstance(value, (tuple, list)) else value

    def _update(self, key: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self.active:
                return output
            x = args[0]
            a, b = self.lora_a[key].to(x.dtype), self.lora_b[key].to(x.dtype)
            rows = x.reshape(self.num_members, -1, x.shape[-1])
            low = torch.bmm(rows, a.transpose(1, 2))
            # One kernel scales, multiplies and adds: nothing of the output's size is made twice.
            own = output.to(x.dtype).reshape(self.num_members, -1, output.shape[-1])
            update = torch.baddbmm(own, low, b.transpose(1, 2), alpha=self.alpha / self.rank)
            return update.reshape(output.shape).to(output.dtype)

        return hook

    # Scores and loss.

    def rewards(self, features: Tensor) -> Tensor:
        """Raw rewards (B, K) of features (B, K, H)."""
        with torch.autocast(features.device.type, enabled=False):
            return torch.einsum("bkh,kh->bk", features.float(), self.weight)

    def loss(self, chosen: Tensor, rejected: Tensor, labels: PairLabels) -> Tensor:
        """The base's loss, less the members' diversity."""
        loss = super().loss(chosen, rejected, labels)
        if self.diversity > 0:
            values = [nuclear_diversity(a) for a in self.lora_a.values()]
            loss = loss - self.diversity * self.num_members * torch.stack(values).mean()
        return loss

    # On disk.

    def adapters(self) -> list[Adapter]:
        """Each member's adapters and head."""
        return [
            Adapter(
                self.rank,
                self.alpha,
                {_name(key): (self.lora_a[key][k].detach(), self.lora_b[key][k].detach()) for key in self.lora_a},
                self.weight[k].detach(),
            )
            for k in range(self.num_members)
        ]

    @torch.no_grad()
    def load_adapters(self, adapters: list[Adapter]) -> None:
        """Take members read from folders.

        Raises:
            ValueError: A member has other layers or shapes.
        """
        for k, adapter in enumerate(adapters):
            own, given = {_name(key) for key in self.lora_a}, set(adapter.weights)
            if own != given:
                raise ValueError(
                    f"member_{k}: expected adapters of {len(own)} layers of this base, got {len(given)}; the first "
                    f"that differs: {sorted(own ^ given)[0]}"
                )
            for name, (a, b) in adapter.weights.items():
                for mine, loaded in ((self.lora_a[_key(name)], a), (self.lora_b[_key(name)], b)):
                    if mine[k].shape != loaded.shape:
                        raise ValueError(
                            f"member_{k}: expected {name} of shape {tuple(mine[k].shape)}, got {tuple(loaded.shape)}: "
                            "an adapter of another base"
                        )
                    mine[k].copy_(loaded)
            self.weight[k].copy_(adapter.score)

    def saved_state(self) -> dict[str, Tensor]:
        """Normalisation alone: heads and adapters stand in the members' folders."""
        return {k: v for k, v in self.state_dict().items() if not re.match(r"lora_|weight$", k)}


def _is_linear(module: nn.Module) -> bool:
    """Linear layers, quantised ones and GPT-2's transposed ones."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Widths of input and output of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = cast("Tensor", module.weight)
    return weight.shape[0], weight.shape[1]


def _key(name: str) -> str:
    # Names of parameters may hold no dots, and names of layers no slashes.
    return name.replace(".", "/")


def _name(key: str) -> str:
    return key.replace("/", ".")
