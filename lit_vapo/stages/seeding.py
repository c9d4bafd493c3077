"""Random numbers that depend on what they are for, and on nothing that was drawn before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from lightning.pytorch import LightningModule


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """A block whose random numbers depend on `numbers` alone, and leave the stream outside as it was."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**63
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def seeded_batch(module: LightningModule, rank: int) -> AbstractContextManager[None]:
    """A block with the random numbers of this batch of the run.

    They depend on the seed of the process, the number of the batch and `rank` alone: a resumed run draws what the
    uninterrupted one would have drawn, whatever else drew numbers before.

    Args:
        module: What is trained.
        rank: Which process this is; 0 in all of them for numbers that all draw alike.
    """
    return seeded(torch.initial_seed(), module.trainer.fit_loop.total_batch_idx, rank)
