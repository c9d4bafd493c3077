"""Token sequences in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

TOKENS_PER_BATCH = 4096


def length_batches(lengths: Sequence[int], tokens: int = TOKENS_PER_BATCH) -> Iterable[list[int]]:
    """Row numbers in batches of similar length, each at most `tokens` tokens with its padding (or one row)."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        # Rows come shortest first, so the newest row sets the padded width.
        if batch and (len(batch) + 1) * lengths[row] > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def even_batches(lengths: Sequence[int], tokens: int, most: Callable[[int], int]) -> list[list[int]]:
    """The same, in as many batches as the process that needs most of them: sharded models wait for each other.

    Args:
        lengths: Tokens of each row.
        tokens: Tokens of a batch, padding included.
        most: The largest number of batches of all processes, from that of this one.
    """
    batches = list(length_batches(lengths, tokens))
    wanted = most(len(batches))
    while len(batches) < min(wanted, len(lengths)):
        longest = batches.pop(max(range(len(batches)), key=lambda i: len(batches[i])))
        batches += [longest[: len(longest) // 2], longest[len(longest) // 2 :]]
    return batches


def right_pad(sequences: Sequence[Sequence[int]], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, L), padded with 0, and lengths (B,)."""
    lengths = torch.tensor([len(s) for s in sequences], dtype=torch.long)
    ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.as_tensor(sequence)
    return ids.to(device), lengths.to(device)
