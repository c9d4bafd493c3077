"""What a run is refused for before it begins."""

from __future__ import annotations

from typing import Any


def check_context(config: Any, longest: int, key: str = "data.max_length") -> None:
    """Refuse data that a model's context cannot hold.

    Args:
        config: The model's configuration.
        longest: Tokens of the longest sequence there is or may be.
        key: What limits it.

    Raises:
        ValueError: The longest sequence has more tokens than the model has positions.
    """
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ValueError(
            f"{key}: expected at most the model's context of {context} tokens, got a sequence of {longest}"
        )


def check_precision(given: str, *allowed: str) -> None:
    """Refuse a precision in which training would go wrong.

    Half precision throughout would round small updates away; a base's own weights are set by its `dtype`.

    Raises:
        ValueError: It is none of those allowed.
    """
    if given not in allowed:
        raise ValueError(f"trainer.precision: expected {' or '.join(allowed)}, got {given}")
