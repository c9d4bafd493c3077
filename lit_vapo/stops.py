"""Where a response ends: one rule for data, rollouts and rewards, and one place that says which tokens stop a model."""

from __future__ import annotations

from collections.abc import Sequence


def stop_tokens(*sources: int | Sequence[int] | None) -> tuple[int, ...]:
    """All tokens that stop a model, each once, in ascending order.

    Args:
        sources: What the model's configurations, its tokenizer and the user say: one id, several, or nothing.

    Examples:
        >>> stop_tokens(2, [7, 2], None)
        (2, 7)
    """
    return tuple(
        sorted({i for s in sources if s is not None for i in ([s] if isinstance(s, int) else s) if i is not None})
    )


def end_of_response(ids: Sequence[int], stops: Sequence[int], start: int = 0) -> int | None:
    """Tokens up to and with the first one that stops the model; `None` where none does.

    Args:
        ids: Token ids.
        stops: Tokens that stop the model.
        start: Where to begin looking.

    Examples:
        >>> end_of_response([5, 2, 6, 2], stops=[2])
        2
        >>> end_of_response([5, 2, 6, 2], stops=[2], start=2)
        4
    """
    return next((i + 1 for i in range(start, len(ids)) if ids[i] in stops), None)
