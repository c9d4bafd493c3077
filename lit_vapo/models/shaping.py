"""What happens to the logits before a token is drawn."""

from __future__ import annotations

from typing import NamedTuple


class Shaping(NamedTuple):
    """What happens to the logits before a token is drawn: the same in sampling, log-probabilities and entropies.

    Attributes:
        temperature: The logits are divided by it.
        min_new_tokens: Stop tokens cannot be drawn at this many first positions of a response.
        stops: Tokens that end a response.
    """

    temperature: float = 1.0
    min_new_tokens: int = 0
    stops: tuple[int, ...] = ()
