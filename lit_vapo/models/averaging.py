"""An exponential moving average of weights over iterations: most of the noise of single updates is not in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage(nn.Module):
    """θ̄ ← d·θ̄ + (1 − d)·θ after each iteration, from the weights that training starts with.

    Related: averaging along the course of policy optimisation (WARP, 2406.16768).

    Args:
        live: The weights that are averaged, always in the same order. They are looked up anew each time.
        decay: d, between 0 and 1.
    """

    def __init__(self, live: Callable[[], Sequence[Tensor]], decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.live = live
        self.restart()

    def restart(self) -> None:
        """Begin again from the weights as they are now."""
        # Parameters rather than buffers: data-parallel strategies send buffers around with every iteration.
        self.weights = nn.ParameterList(nn.Parameter(x.detach().clone(), requires_grad=False) for x in self.live())

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after an iteration."""
        for average, value in zip(self.weights, self.live(), strict=True):
            average.lerp_(value, 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A block in which the model has the averaged weights; its own are kept meanwhile, bit for bit."""
        # Whoever merges adapters within leaves no weights of theirs behind to look up.
        pairs = list(zip(self.weights, self.live(), strict=True))
        _swap(pairs)
        try:
            yield
        finally:
            _swap(pairs)


@torch.no_grad()
def _swap(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for one, other in pairs:
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)
