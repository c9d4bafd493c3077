"""Token sequences in batches of similar length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def right_pad(sequences: Sequence[Sequence[int]], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, L), padded with 0, and lengths (B,)."""
    lengths = torch.tensor([len(s) for s in sequences], dtype=torch.long)
    ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.as_tensor(sequence)
    return ids.to(device), lengths.to(device)
