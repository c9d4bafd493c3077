"""Prompts with their responses, as tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lit_vapo.types import TokenSequence


class TokenRows(NamedTuple):
    """Prompts with their responses, right-padded.

    Attributes:
        input_ids: Token ids (B, L).
        prompt_lengths: Tokens of each prompt (B,).
        response_mask: True at the tokens of each response (B, T), from its first token on.
        lower_states: What the blocks below the policy's adapters make of the tokens (B, L, H), if it was kept.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    response_mask: Tensor
    lower_states: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Tokens of prompt and response (B,)."""
        return self.prompt_lengths + self.response_mask.sum(1)

    @property
    def sequences(self) -> list[TokenSequence]:
        """The rows without padding."""
        parts = zip(self.input_ids.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True)
        return [TokenSequence(ids[:length], start) for ids, start, length in parts]

    def select(self, index: Tensor) -> TokenRows:
        """The rows of an index (b,), cut to the longest sequence and the longest response among them."""
        mask = self.response_mask[index]
        prompts = self.prompt_lengths[index]
        size = int(mask.sum(1).max())
        longest = int((prompts + mask.sum(1)).max())
        lower = None if self.lower_states is None else self.lower_states[index, :longest]
        return TokenRows(self.input_ids[index, :longest], prompts, mask[:, :size], lower)
