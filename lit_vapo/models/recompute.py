"""Gradient checkpointing (1604.06174): blocks keep their inputs alone, and are computed again on the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    blocks = list(decoder_layers(backbone))[:-1]
    # What others have put in place of a class's own.
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        function = partial(checkpoint, block.forward, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))
        cast("Any", block).forward = function
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                cast("Any", block).forward = forward
