"""When a run is saved, which checkpoints are kept, and what trackers are told of them."""

import io
import random
import time

import numpy as np
import pytest
import torch
from helpers import last
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.utilities import _scan_checkpoints

from lit_vapo.callbacks.checkpoint import RunCheckpoint
from lit_vapo.callbacks.random_numbers import random_states, set_random_states
from lit_vapo.cli import main
from lit_vapo.trackers import Lasting, go_on, run_ids

VALIDATED = ("--trainer.max_steps=4", "--trainer.val_check_interval=1", "--checkpoint.every_iterations=1")


def due(checkpoint, since, iteration=7, cost=0.0):
    checkpoint._saved_at, checkpoint._cost = time.monotonic() - since, cost
    return checkpoint._is_due(iteration)


def test_saving_takes_a_hundredth_of_the_time_unless_told_otherwise():
    assert not due(RunCheckpoint(), since=14)
    assert due(RunCheckpoint(), since=16)
    assert not due(RunCheckpoint(), since=190, cost=2.0)
    assert due(RunCheckpoint(), since=210, cost=2.0)
    assert not due(RunCheckpoint(every_minutes=10), since=590)
    assert due(RunCheckpoint(every_minutes=10), since=610, cost=100.0)
    assert [due(RunCheckpoint(every_iterations=3), since=0, iteration=n) for n in (5, 6)] == [False, True]
    # Whichever comes first.
    assert due(RunCheckpoint(every_minutes=10, every_iterations=3), since=0, iteration=6)


def test_the_newest_and_the_best_are_kept(stage_args, tmp_path):
    main(stage_args("sft", "fit", tmp_path, *VALIDATED, "--checkpoint.keep_last=1", "--checkpoint.mode=max"))
    # The loss falls, so that the first is the best by this measure.
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["best.ckpt", "iteration=000001.ckpt", "iteration=000004.ckpt", "last.ckpt"]
    assert last(tmp_path).resolve().name == "iteration=000004.ckpt"
    assert (tmp_path / "checkpoints" / "best.ckpt").resolve().name == "iteration=000001.ckpt"


def test_only_what_is_validated_can_be_monitored(stage_args, tmp_path):
    with pytest.raises(ValueError, match="checkpoint.monitor: expected one of val/loss, got 'val/accuracy'"):
        main(stage_args("sft", "fit", tmp_path, *VALIDATED, "--checkpoint.monitor=val/accuracy"))


@pytest.mark.parametrize("other", ["--overwrite=true", "--ckpt_path=last"])
def test_resume_stands_alone(stage_args, tmp_path, other):
    with pytest.raises(ValueError, match="--resume: expected neither ckpt_path nor overwrite beside it, got "):
        main(stage_args("sft", "fit", tmp_path, "--resume", other))


def test_trackers_find_the_newest_and_the_best(stage_args, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Lasting, "after_save_checkpoint", lambda self, callback: told.append(callback))
    offline = ("--trainer.logger=WandbLogger", "--trainer.logger.offline=true", f"--trainer.logger.save_dir={tmp_path}")
    # By this measure the first is the best, so that it is not the newest, too.
    main(stage_args("sft", "fit", tmp_path / "run", *VALIDATED, *offline, "--checkpoint.mode=max"))
    found = {path: tag for _, path, _, tag in _scan_checkpoints(told[-1], {})}
    folder = (tmp_path / "run" / "checkpoints").resolve()
    assert set(found) == {str((folder / f"{name}.ckpt").resolve()) for name in ("last", "best")}
    assert len(found) == 2
    # The name of the run is kept, for a run that is resumed.
    state = torch.load(last(tmp_path / "run"), weights_only=True)["callbacks"]["RunCheckpoint"]
    assert len(state["trackers"]) == 1
    assert list(tmp_path.glob(f"wandb/offline-run-*-{state['trackers'][0]}"))


def test_wandb_goes_on_with_the_same_run():
    told, free = WandbLogger(id="mine", offline=True), WandbLogger(offline=True)
    go_on([told, free], ["kept", "abc"])
    assert run_ids([told, free]) == ["mine", "abc"]
    assert free._wandb_init["resume"] == "allow"


def test_random_numbers_go_on_where_they_were():
    def draw():
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    file = io.BytesIO()
    torch.save(random_states(), file)
    drawn = draw()
    file.seek(0)
    set_random_states(torch.load(file, weights_only=True))
    assert draw() == drawn
