"""Does the number of members matter? Time of training K = 32 heads against K = 1, from cached features.

Both are trained by the reward stage itself (`RewardModule` under a Lightning trainer), alternately and in one run;
the ratio is taken pair by pair, so a machine whose speed drifts favours neither.

    python benchmarks/head_ensemble.py
    python benchmarks/head_ensemble.py --members 64 --hidden_size 4096 --pairs 20000 --batch_size 256
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lit_vapo.data.splits import FeatureRows
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.stages.reward.module import RewardModule


class FromFeatures(RewardModule):
    """The reward stage, its features at hand."""

    hidden_size = 0

    def configure_model(self) -> None:
        """Build the head only."""
        if self.head.hidden_size is None:
            self.head.build(self.hidden_size)

    def on_train_start(self) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_end(self) -> None:
        """Stop the clock."""
        self.seconds = time.perf_counter() - self.started


def train_seconds(members: int, rows: FeatureRows, hidden_size: int, epochs: int, batch_size: int, root: str) -> float:
    """Seconds of `epochs` passes over the features."""
    FromFeatures.hidden_size = hidden_size
    module = FromFeatures(Pretrained("none"), HeadEnsemble(members))
    loader = DataLoader(rows, batch_size=batch_size, shuffle=True, collate_fn=lambda batch: batch)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        default_root_dir=root,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return module.seconds


def main(
    members: int = 32,
    hidden_size: int = 576,
    pairs: int = 4000,
    epochs: int = 4,
    batch_size: int = 32,
    repetitions: int = 9,
    threads: int = 1,
) -> None:
    """Print the ratio of times.

    Args:
        members: K of the larger ensemble.
        hidden_size: Width of the features.
        pairs: Preferences in the cache.
        epochs: Passes in one timing.
        batch_size: Pairs of a step.
        repetitions: Pairs of timings; the median of their ratios is the result.
        threads: Threads of torch.
    """
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    columns = torch.randn(2, pairs, hidden_size)
    rows = FeatureRows(columns[0], columns[1], torch.zeros(pairs), torch.arange(pairs))
    ratios, singles = [], []
    with tempfile.TemporaryDirectory() as root:

        def timed(count: int) -> float:
            return train_seconds(count, rows, hidden_size, epochs, batch_size, root)

        timed(1)
        for i in range(repetitions):
            order = (members, 1) if i % 2 else (1, members)
            seconds = {count: timed(count) for count in order}
            ratios.append(seconds[members] / seconds[1])
            singles.append(seconds[1])
    steps = epochs * -(-pairs // batch_size)
    print(
        f"one member: {1e3 * statistics.median(singles) / steps:.2f} ms a step (batch {batch_size}, H = {hidden_size})"
    )
    print(
        f"K = {members} against K = 1: median ratio {statistics.median(ratios):.3f} "
        f"(from {min(ratios):.3f} to {max(ratios):.3f}, {repetitions} alternating pairs, {threads} thread)"
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
