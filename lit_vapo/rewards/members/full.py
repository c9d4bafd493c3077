"""K reward models, each with a backbone of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_vapo.ranges import PositiveInt, Smoothing
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.types import PairLabels


class FullEnsemble(RewardHead):
    """K independently trained reward models: the ensemble of 2507.15906, and the baseline of the others.

    Every member is a whole backbone with a linear head. By default one run trains them all and holds weights, optimiser
    states and activations of all. With `model.member` a run trains one of them, in the memory of one: run after run, or
    in any number of processes at once. `lit-vapo reward join` then makes an ensemble of the members. In training no
    member reads the pairs that its bootstrap leaves out.

    Args:
        num_members: Number of members K. A variance needs at least 2.
        resident: Hold all backbones in memory while scoring; if off, they are read from disk one after another at each
            call, which takes the memory of one.
        bootstrap: Weight pairs by Poisson(1) counts per member; if off, members differ by their heads' initialisation
            (and by the order of data, where they are trained in runs of their own).
        label_smoothing: Share of preferences taken to be stated the wrong way round, in [0, 0.5).
        centering: Weight of the penalty (r_chosen + r_rejected)², which keeps rewards near zero.
        seed: Seed of initialisation and bootstrap.
        moderated: Shrink σ² of each response to the typical one, as far as K − 1 degrees of freedom leave it unknown.
    """

    shares_features = False
    owns_backbones = True

    def __init__(
        self,
        num_members: PositiveInt = 4,
        resident: bool = True,
        bootstrap: bool = True,
        label_smoothing: Smoothing = 0.0,
        centering: float = 0.0,
        seed: int = 0,
        moderated: bool = True,
    ) -> None:
        super().__init__(num_members, bootstrap, label_smoothing, centering, seed, moderated)
        self.resident = resident
        self._rows = 0

    def make_parameters(self, hidden_size: int) -> None:
        """Draw the members' heads."""
        # No bias: a preference cannot tell what it is.
        self.weight = nn.Parameter(self.draw((hidden_size,), hidden_size, stream=0))

    def attach(self, backbone: nn.Module, blocks: nn.ModuleList) -> nn.Module:
        """A copy of the backbone for each member, to be trained in float32."""
        members = [backbone, *(copy.deepcopy(backbone) for _ in self.present_members[1:])]
        # Small updates of weights in bfloat16 would be rounded away.
        return nn.ModuleList(member.float().requires_grad_(True) for member in members)

    def select(self, member: int) -> None:
        """Train one member by itself.

        Raises:
            ValueError: There is no such member.
        """
        if not 0 <= member < self.num_members:
            raise ValueError(f"model.member: expected 0 … {self.num_members - 1}, got {member}")
        self.present = slice(member, member + 1)

    def passes(self, backbone: Sequence[nn.Module | Callable[[], nn.Module]]) -> Iterator[Any]:
        """The members' backbones one after another, read from disk where they are not held."""
        for member in backbone:
            yield member if isinstance(member, nn.Module) else member().to(self.weight.device)

    @contextmanager
    def learning_from(self, labels: PairLabels) -> Iterator[None]:
        """A block in which each member reads the pairs that its bootstrap counts; one, if it counts none.

        A member that read nothing would have no gradients, for which data-parallel processes wait.
        """
        counted = self.pair_weights(labels, len(self.present_members)) > 0
        self._rows = 2 * len(counted)
        if not counted.all():
            pairs = [torch.nonzero(member)[:, 0] if member.any() else member[:1].long() * 0 for member in counted.T]
            self.reads = [torch.cat([some, some + len(counted)]) for some in pairs]
        try:
            yield
        finally:
            self.reads = None

    def join(self, outputs: list[Tensor]) -> Tensor:
        """Features (B, K, H)."""
        if self.reads is not None:
            # Zeros for what nobody has read.
            empty = (x.new_zeros(self._rows, x.shape[-1]) for x in outputs)
            members = zip(empty, self.reads, outputs, strict=True)
            outputs = [zeros.index_put((rows,), features) for zeros, rows, features in members]
        return torch.stack(outputs, dim=1)

    def rewards(self, features: Tensor) -> Tensor:
        """Raw rewards (B, K) of features (B, K, H); of the member under training alone, if there is one."""
        with torch.autocast(features.device.type, enabled=False):
            return torch.einsum("bkh,kh->bk", features.float(), self.weight[self.present])
