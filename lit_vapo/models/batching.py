"""Token sequences in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

TOKENS_PER_BATCH = 4096
# What a layer makes of more tokens than these no longer stays in a processor's cache.
TOKENS_ON_CPU = 1024
# A pass costs a processor as much as so many tokens, before it has read one: to fetch the weights, and to call kernels.
PASS_ON_CPU = 32


def length_batches(lengths: Sequence[int], device: torch.device, tokens: int = TOKENS_PER_BATCH) -> list[list[int]]:
    """Row numbers in batches of similar length, each at most `tokens` tokens with its padding (or one row).

    A GPU is given batches as full as they can be, a processor smaller ones where that saves padding.

    Args:
        lengths: Tokens of each row.
        device: Where they are computed.
        tokens: Tokens of a batch, padding included.

    Returns:
        Rows by batch, shortest first.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    sizes = [lengths[i] for i in order]
    starts = _cheapest(sizes, min(tokens, TOKENS_ON_CPU)) if device.type == "cpu" else _filled(sizes, tokens)
    return [order[start:end] for start, end in pairwise([*starts, len(order)])]


def _filled(sizes: Sequence[int], tokens: int) -> list[int]:
    """Where batches of ascending sizes begin that take as many rows as they can."""
    starts: list[int] = []
    for row, size in enumerate(sizes):
        # The newest row sets the padded width.
        if not starts or (row + 1 - starts[-1]) * size > tokens:
            starts.append(row)
    return starts


def _cheapest(sizes: Sequence[int], tokens: int) -> list[int]:
    """Where batches of ascending sizes begin that take the least of a processor: tokens, padding, and a pass each."""
    # Cheapest way to have the first `end` rows behind one, and where its last batch begins.
    least, begin = [0], [0]
    for end, width in enumerate(sizes, start=1):
        first = max(0, end - max(1, tokens // width))
        spent, start = min((least[start] + (end - start) * width + PASS_ON_CPU, start) for start in range(first, end))
        least.append(spent)
        begin.append(start)
    starts: list[int] = []
    end = len(sizes)
    while end:
        end = begin[end]
        starts.insert(0, end)
    return starts


def even_batches(
    lengths: Sequence[int], tokens: int, most: Callable[[int], int], device: torch.device
) -> list[list[int]]:
    """The same, in as many batches as the process that needs most: sharded models wait for each other.

    Args:
        lengths: Tokens of each row.
        tokens: Tokens of a batch, padding included.
        most: The largest number of batches of all processes, from that of this one.
        device: Where they are computed.
    """
    batches = length_batches(lengths, device, tokens)
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
