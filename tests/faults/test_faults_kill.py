"""A run that is killed at any moment and resumed ends as if nothing had happened: weights, optimiser, rows, files."""

import os
import random

import pytest
from faults.kinds import KINDS
from faults.runs import after, differences, left

pytestmark = pytest.mark.faults
# `make faults` kills every kind, and more often (`python -m tests.faults`).
SOME = ["sft-lora-workers", "sft-accumulated", "heads", "bayesian", "lora", "ppo", "ppo-covariance-rloo"]


@pytest.mark.parametrize("kind", SOME)
def test_a_killed_run_goes_on_as_if_it_had_not_been(server, world, whole, tmp_path, kind):
    expected, seconds = whole(kind)
    chance = random.Random(os.environ.get("LIT_VAPO_KILL_SEED", kind))
    words, log, moments = world.words(kind, tmp_path / "run", "--resume"), tmp_path / "log.txt", []
    code = None
    while code is None or code == -9:
        # Later ones before earlier ones: there is a checkpoint, and something left to do.
        moments.append(round(chance.uniform(0.5, 0.95) * seconds, 2))
        code, _ = server.run(words, log, after(moments[-1]) if len(moments) < 2 else None)
    assert code == 0, log.read_text()
    assert differences(left(tmp_path / "run"), left(expected)) == [], moments


def test_every_kind_of_run_is_killed_by_the_command():
    assert set(SOME) < set(KINDS)
