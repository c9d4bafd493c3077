"""Two processes that share a batch train and log what one does with the whole of it."""

import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import several_worker
import torch

from lit_vapo.data.datamodule import SFTDataModule


@pytest.fixture(scope="module")
def runs(tiny_model_dir, tmp_path_factory):
    """What a kind of run leaves behind in one process, and what in two."""
    folder = tmp_path_factory.mktemp("several")
    preferences = helpers.tiny_preferences(folder / "preferences.jsonl", 28)
    data = SFTDataModule(tiny_model_dir, preferences=preferences, validation_fraction=0.3, max_length=64)
    # The last batch is one pair: the second process has nothing but a stand-in. And a held-out pair is dealt out twice.
    assert len(data.preference_rows("train")) % several_worker.TOGETHER == 1
    assert len(data.preference_rows("val")) % 2 == 1
    tests = Path(several_worker.__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, several_worker.__file__, tiny_model_dir, preferences, str(folder), "ddp_fork"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    def left(kind):
        several_worker.run(kind, tiny_model_dir, preferences, folder)
        return [torch.load(folder / f"{kind}_{world}.pt", weights_only=True) for world in (1, 2)]

    return left


@pytest.mark.parametrize("kind", several_worker.KINDS)
def test_two_processes_learn_and_log_what_one_does(runs, kind):
    one, two = runs(kind)
    assert [len(step) for step in one["pairs"]] == [8, 8, 1] * 2
    assert two["pairs"] == one["pairs"]
    assert two["logged"] == pytest.approx(one["logged"], abs=1e-5)
    assert two["figures"] == pytest.approx(one["figures"], abs=1e-5, nan_ok=True)
    assert any(name.startswith("val/") for name in one["figures"])
    # A thousandth of what Adam may move a weight in the steps of a run.
    torch.testing.assert_close(two["weights"], one["weights"], atol=1e-5, rtol=0)
