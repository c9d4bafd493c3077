"""Lines of progress where there is no terminal."""

import re
import sys

import pytest
from lightning.pytorch.callbacks import Timer, TQDMProgressBar

from lit_vapo import progress
from lit_vapo.callbacks.plain_progress import PlainProgress, lines_for_bar
from lit_vapo.cli import main


def test_a_run_without_a_terminal_tells_how_far_it_is(stage_args, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    words = {"trainer__enable_progress_bar": "true", "trainer__max_epochs": 2}
    main(stage_args("sft", "fit", tmp_path / "run", **words))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    assert said
    assert all(re.match(r"epoch \d of 2, batch \d of \d, \d:\d\d( \| \w+ \S+)*$", line) for line in said), said
    assert any("loss" in line for line in said)


def test_what_a_module_says_is_printed_beside_the_lines(stage_args, tmp_path, capsys, tiny_model_dir):
    reference = ("--model.reference_sampling.max_new_tokens=6", "--model.num_reference=12")
    words = {"trainer__enable_progress_bar": "true", "model__reference__path": tiny_model_dir}
    main(stage_args("reward", "fit", tmp_path / "run", *reference, **words))
    said = capsys.readouterr()
    assert "reference: sampling" in said.out
    # The run ends by `max_steps`, amid an epoch.
    assert re.fullmatch(r"epoch 1, batch 2 of 5, .*\n", said.err)


@pytest.mark.parametrize(
    ("command", "line"),
    [("validate", "validation, batch 1 of 1"), ("test", "test, batch 1 of 1"), ("predict", "predict, batch 2 of 2")],
)
def test_whatever_runs_says_when_it_is_through(stage_args, ppo_run, tiny_ensemble_dir, tmp_path, capsys, command, line):
    words = {
        "trainer__enable_progress_bar": "true",
        "trainer__limit_test_batches": 2,
        "trainer__limit_predict_batches": 2,
    }
    checkpoint = f"--ckpt_path={ppo_run}/checkpoints/last.ckpt"
    main(stage_args("ppo", command, tmp_path / "run", checkpoint, model__reward=tiny_ensemble_dir, **words))
    said = capsys.readouterr().err.splitlines()
    assert [x for x in said if x.startswith(line.partition(",")[0])] == [x for x in said if x.startswith(line)] != []


def test_a_validation_amid_training_is_told_of_by_time_alone(
    stage_args, tmp_path, tiny_ensemble_dir, capsys, monkeypatch
):
    words = {"trainer__enable_progress_bar": "true", "model__reward": tiny_ensemble_dir}
    main(stage_args("ppo", "fit", tmp_path / "run", **words))
    assert re.findall(r"^(\w+)", capsys.readouterr().err, re.M) == ["batch"]
    monkeypatch.setattr(progress, "EVERY", 0.0)
    main(stage_args("ppo", "fit", tmp_path / "other", **words))
    assert "validation, batch 1 of 1" in capsys.readouterr().err


def test_lines_are_few_where_batches_are_fast(stage_args, tmp_path, capsys):
    main(stage_args("sft", "fit", tmp_path / "run", trainer__enable_progress_bar="true", trainer__max_epochs=1))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("epoch", "batch"))]
    assert len(said) == 1


def test_who_wants_none_gets_none(stage_args, tmp_path, capsys):
    main(stage_args("sft", "fit", tmp_path / "run", trainer__max_epochs=1))
    assert not re.search("^(epoch|batch) ", capsys.readouterr().err, re.M)


def test_a_bar_that_was_named_stays_and_one_on_a_terminal_too(monkeypatch):
    bar, other = TQDMProgressBar(), Timer()
    swapped = lines_for_bar([other, bar], None)
    assert swapped[0] is other
    assert isinstance(swapped[1], PlainProgress)
    assert lines_for_bar([other, bar], [bar]) == [other, bar]
    assert lines_for_bar([other, bar], bar) == [other, bar]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert lines_for_bar([other, bar], None) == [other, bar]


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (65.9, "1:05"), (3723, "1:02:03")])
def test_clock(seconds, shown):
    assert progress.clock(seconds) == shown


def test_what_no_trainer_looks_after_says_how_far_it_is(monkeypatch, capsys):
    times = iter([0.0, 4.0, 11.0, 15.0, 22.0, 70.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    assert list(progress.watched("abcde", "features: batch")) == list("abcde")
    # Not after the last, when whoever asked has something to say.
    assert capsys.readouterr().err == "features: batch 2 of 5, 0:11\nfeatures: batch 4 of 5, 0:22\n"
