"""How much of an update is signal: the gradients of two halves of a minibatch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_vapo.functional import gradient_signal

# 16 MB of float32. So many entries tell as much as all would, and adapters rarely have more.
MOST_ENTRIES = 2**22


class Halves(NamedTuple):
    """Row numbers of the halves of a minibatch."""

    first: Tensor
    second: Tensor


def halves_by_prompt(index: Tensor, num_responses: int) -> Halves | None:
    """Halves of a minibatch in which no prompt is in both, since responses to one prompt are compared with each other.

    Nothing random: rows come in random order already.

    Args:
        index: Rows of the rollout that are in the minibatch (M,), those of a prompt together there.
        num_responses: Responses to each prompt.

    Returns:
        Numbers of rows within the minibatch, or `None` where all answer one prompt.
    """
    _, place = (index // num_responses).unique(return_inverse=True)
    odd = place % 2 == 1
    return Halves((~odd).nonzero()[:, 0], odd.nonzero()[:, 0]) if bool(odd.any()) else None


class SignalProbe:
    """Looks at the gradient of the policy after half of a minibatch, and after all of it.

    Of more than four million entries it looks at so many, evenly spaced.

    Args:
        parameters: What the policy loss trains; their gradients start at zero.
        halves: How the minibatch is cut.
        all_sum: Sum of a tensor over all processes.
        processes: How many there are.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        halves: Halves,
        all_sum: Callable[[Tensor], Tensor],
        processes: int,
    ) -> None:
        self.parameters = parameters
        self.halves = halves
        self.all_sum = all_sum
        self.processes = processes
        self._first: Tensor | None = None

    def look(self) -> None:
        """Remember the gradient of the first half; of this process, as gradients are exchanged at the end."""
        self._first = self._entries()

    def statistics(self) -> dict[str, Tensor]:
        """Cosine and share of signal over all processes, once all has been gone through and gradients are exchanged."""
        assert self._first is not None
        rows = torch.tensor([len(half) for half in self.halves], dtype=torch.float64, device=self._first.device)
        first, second = self.all_sum(rows)
        # Data-parallel strategies average gradients.
        found = gradient_signal(self.all_sum(self._first) / self.processes, self._entries(), first / (first + second))
        self._first = None
        return {"actor_grad_cosine": found.cosine, "actor_grad_signal": found.share}

    def _entries(self) -> Tensor:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        step = -(-sum(gradient.numel() for gradient in gradients) // MOST_ENTRIES)
        return torch.cat([gradient.flatten()[:: _stride(gradient, step)] for gradient in gradients]).float()


def _stride(x: Tensor, step: int) -> int:
    """A step of at least this size that does not meet the same columns of a matrix over and over."""
    while step > 1 and math.gcd(step, x.shape[-1]) > 1:
        step += 1
    return step
