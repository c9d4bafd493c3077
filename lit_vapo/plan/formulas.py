"""Bytes and seconds by arithmetic: what needs no model to be worked out. Rates are in bytes/s or FLOP/s."""

from __future__ import annotations

from collections.abc import Sequence

# Of a GPU's memory this much stays free: the CUDA context and its libraries (some 0.5 GB), and gaps between what is
# allocated. An assumption: nobody measured it here.
MARGIN = 0.10
# Shares of a GPU's rates that a plan counts on. Assumptions too: PyTorch in eager mode reaches a third to a half of the
# products of a data sheet in large batches, and half of the bandwidth when it generates token by token.
UTILISATION, BANDWIDTH_USE = 0.35, 0.5
# What cuBLAS works in: PyTorch gives it 32 MiB on Hopper and later (8 before), for the thread of the passes forward and
# for that of the way back.
CUBLAS = 2 * 32 * 2.0**20


def adam_bytes(trained: float) -> float:
    """AdamW's two moments, each as large as what is trained.

    Examples:
        >>> adam_bytes(4e6)
        8000000.0
    """
    return 2.0 * trained


def sharded(whole: float, devices: int, gathered: float) -> float:
    """What a device holds of something that is divided, with what it gathers of it for a while.

    Args:
        whole: Undivided.
        devices: Among how many it is divided.
        gathered: What is whole at a time: the blocks at work.

    Examples:
        >>> sharded(80.0, 8, 4.0)
        14.0
        >>> sharded(80.0, 1, 4.0)  # one device has nothing to gather
        80.0
    """
    return whole if devices == 1 else whole / devices + gathered


def microbatch(rows: int, width: int, tokens: int) -> int:
    """Rows in a pass of at most so many tokens, or one row.

    Examples:
        >>> microbatch(rows=16, width=768, tokens=4096)
        5
        >>> microbatch(rows=16, width=768, tokens=512)
        1
    """
    return min(rows, max(1, tokens // width))


def attention_flops(query: Sequence[int], key: Sequence[int]) -> float:
    """Products of attention with queries (B, heads, L, D) and keys (B, heads, S, D): 2·B·heads·L·S·D, twice.

    Examples:
        >>> attention_flops((1, 2, 4, 8), (1, 2, 4, 8))
        1024.0
    """
    batch, heads, rows, width = query
    return 4.0 * batch * heads * rows * key[2] * width


def seconds(flops: float, rate: float, traffic: float, bandwidth: float) -> float:
    """Time of work that waits for products or for memory, whichever takes longer.

    Examples:
        >>> seconds(flops=10.0, rate=5.0, traffic=6.0, bandwidth=2.0)
        3.0
    """
    return max(flops / rate, traffic / bandwidth)


def fits(peak: float, memory: float) -> bool:
    """Whether a peak leaves the margin free.

    Examples:
        >>> fits(71e9, 80e9), fits(73e9, 80e9)
        (True, False)
    """
    return peak <= (1 - MARGIN) * memory
