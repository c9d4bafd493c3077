"""Experiments for the tests of studies: each in the file that its class_path names."""

import time

import numpy as np

from lit_vapo.study.experiment import Experiment, Record


class Toy(Experiment):
    """Three settings, two methods: `bold` varies twice as much as `calm`.

    Args:
        scale: Spread of the returns.
        fails: Repetitions that fail in setting `b`.
        seconds: How long a repetition takes.
        block_size: Repetitions in one file.
    """

    def __init__(self, scale: float = 1.0, fails: list[int] | None = None, seconds: float = 0, block_size: int = 1):
        self.scale = scale
        self.fails = fails or []
        self.seconds = seconds
        self.block_size = block_size

    @property
    def settings(self):
        return {name: {"size": size} for name, size in (("c", 1), ("a", 2), ("b", 3))}

    def run_block(self, setting, repetitions):
        # In another order than the results have.
        records = [record for repetition in repetitions for record in self.repeat(setting, repetition)]
        return sorted(records, key=lambda record: record.method)

    def repeat(self, setting, repetition):
        if setting == "b" and repetition.number in self.fails:
            raise RuntimeError(f"no luck with {repetition.number}")
        time.sleep(self.seconds)
        z = np.random.default_rng(repetition.seed).standard_normal(2) * self.scale
        runs = {"bold": [1.0 + 2 * z[0], 1.0 + 4 * z[0]], "calm": [1.0 + z[0], 1.0 + z[0] + z[1]]}
        # Calm runs of even repetitions stop before a KL of 1.
        far = {"bold": 2.0, "calm": 2.0 if repetition.number % 2 else 0.5}
        return [Record(name, setting, *repetition, [0.1, far[name]], gains, 0.5) for name, gains in runs.items()]
