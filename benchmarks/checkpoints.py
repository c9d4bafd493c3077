"""What share of a run's time saving it takes, at the defaults: one run of each stage that lasts some minutes.

Nothing is validated: what is the best so far is saved besides, as often as there is a better one.

python benchmarks/checkpoints.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import helpers
import torch
from faults.kinds import KINDS, World

from lit_vapo.callbacks.checkpoint import RunCheckpoint
from lit_vapo.cli import main

SIZES = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_key_value_heads": 4}


class Watch:
    """Adds up what saving takes."""

    def __init__(self) -> None:
        self.seconds, self.count, self.bytes = 0.0, 0, 0
        original = RunCheckpoint._save

        def save(checkpoint: RunCheckpoint, trainer: object, *args: object, **options: object) -> None:
            started = time.perf_counter()
            original(checkpoint, trainer, *args, **options)
            self.seconds += time.perf_counter() - started
            self.count += 1
            self.bytes = (checkpoint.folder / "last.ckpt").stat().st_size

        RunCheckpoint._save = save


def measure(kind: str, minutes: float) -> str:
    """A row of the table: a run that is ended by the clock."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = World(folder)
        helpers.tiny_model(folder / "model", helpers.tiny_tokenizer(folder / "model", chat_template=True), **SIZES)
        if KINDS[kind][0] == "ppo":
            run = folder / "ensemble-run"
            main(world.words("heads", run))
            main(["export", f"--checkpoint={run}/checkpoints/last.ckpt", f"--output={world.ensemble}"])
        words = [word for word in world.words(kind, folder / "run") if "every_iterations" not in word]
        watch = Watch()
        started = time.perf_counter()
        main(
            [
                *words,
                "--trainer.limit_val_batches=0",
                "--trainer.max_epochs=100000",
                f"--trainer.max_time=00:00:00:{60 * minutes:.0f}",
            ]
        )
        total = time.perf_counter() - started
    size, share = watch.bytes / 2**20, 100 * watch.seconds / total
    return f"| {kind} | {total:.0f} s | {watch.count} | {size:.1f} MB | {watch.seconds:.2f} s | {share:.2f}% |"


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=3.0)
    options.add_argument("--kinds", nargs="*", default=["sft", "heads", "lora", "ppo"])
    given = options.parse_args()
    torch.set_num_threads(1)
    rows = [measure(kind, given.minutes) for kind in given.kinds]
    print("| run | time | saved | a checkpoint | saving took | share |\n| --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))
