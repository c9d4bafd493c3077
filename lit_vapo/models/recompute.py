"""Gradient checkpointing (1604.06174): blocks keep their inputs alone, and are computed again on the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lit_vapo.models.pretrained import decoder_layers, recomputes_blocks

# Opens a block in which a model is as it was in the forward pass: its adapters in the same role.
Again = Callable[[], AbstractContextManager[Any]]


@contextmanager
def recomputed(backbone: nn.Module, again: Again = nullcontext) -> Iterator[None]:
    """A block in which a pass through a backbone keeps only what goes into each of its blocks, if it is to.

    transformers would do so in training mode alone, which switches dropout on too. Here the gradient decides.
    The last block is left as it is: it would be computed again at once, when what it keeps is all there is.

    Args:
        backbone: A decoder without its language-model head.
        again: What the blocks are computed again in. By then somebody may have switched the model to another role.
    """
    if not (recomputes_blocks(backbone) and torch.is_grad_enabled()):
        yield
        return

    def again_on_the_way_back(forward: Callable[..., Any]) -> Callable[..., Any]:
        return partial(checkpoint, forward, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))

    with forwards(list(decoder_layers(backbone))[:-1], again_on_the_way_back):
        yield


@contextmanager
def forwards(blocks: Sequence[nn.Module], change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """A block in which some modules compute something else: what is made of each one's `forward`."""
    # What others have put in place of a class's own.
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        cast("Any", block).forward = change(block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                cast("Any", block).forward = forward
