"""The blocks below the lowest adapter. Policy and reference make the same of a text there: it is computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from lit_vapo.models.policy import Policy
from lit_vapo.models.pretrained import decoder_layers
from lit_vapo.models.recompute import forwards


class LowerBlocks:
    """The blocks of a base that the actor's adapters leave alone, from the first one up.

    Args:
        policy: Actor and reference. Where the reference is another model, nothing is reused.

    Attributes:
        depth: How many blocks; 0 where nothing can be reused.
        tried: Whether `compare` was called.
    """

    def __init__(self, policy: Policy) -> None:
        self.blocks = decoder_layers(cast("nn.Module", policy.causal_lm.base_model))
        adapted = (i for i, block in enumerate(self.blocks) if _is_adapted(block))
        # Upper blocks that read keys of lower ones (Gemma 4) cannot start from states.
        shares_keys = getattr(policy.causal_lm.config.get_text_config(), "num_kv_shared_layers", 0)
        self.depth = 0 if shares_keys or policy.reference_lm is not None else next(adapted, 0)
        self.tried = False
        self._in_tuple = False

    @contextmanager
    def keep(self) -> Iterator[list[Tensor]]:
        """A block in which each pass adds to a list what leaves these blocks (B, L, H), before any normalisation."""
        kept: list[Tensor] = []
        if not self.depth:
            yield kept
            return

        def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            states = output if isinstance(output, Tensor) else output[0]
            self._in_tuple = states is not output
            if states.ndim == 3:
                kept.append(states)
            else:
                # Several streams (Gemma 3n), which nobody else knows how to cut.
                self.depth = 0

        handle = self.blocks[self.depth - 1].register_forward_hook(hook)
        try:
            yield kept
        finally:
            handle.remove()

    @contextmanager
    def give(self, states: Tensor | None) -> Iterator[None]:
        """A block in which these blocks give states that were kept (B, L, H), and compute nothing; `None` for not."""
        if states is None:
            yield
            return
        output = (states,) if self._in_tuple else states
        with forwards(list(self.blocks)[: self.depth], lambda _: lambda *_, **__: output):
            yield

    def compare(self, whole: Tensor, resumed: Tensor) -> None:
        """Reuse nothing from now on if a pass that was given states ended elsewhere than a whole one.

        An architecture may hand more from block to block than states.
        """
        self.tried = True
        if not torch.allclose(resumed.float(), whole.float(), rtol=1e-2, atol=1e-2):
            self.depth = 0


def _is_adapted(block: nn.Module) -> bool:
    return any("lora_" in name and ".actor." in name for name, _ in block.named_parameters())
