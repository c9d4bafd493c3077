"""The best checkpoint of the reward stage is kept, and a run ends with a verdict."""

import json

import helpers
import pytest
import torch

from lit_vapo.cli import main
from lit_vapo.stages.base import FIGURES_KEY

EPOCHS = ["--trainer.max_epochs=3", "--trainer.max_steps=-1"]


def saved(folder, name):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def turned(tmp_path_factory, tiny_preferences_file):
    """The same pairs with the other response preferred: what is learned makes these worse."""
    path = tmp_path_factory.mktemp("turned") / "pairs.jsonl"
    with open(tiny_preferences_file) as file:
        rows = [json.loads(line) for line in file]
    return helpers.write_jsonl(path, [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows])


def test_the_checkpoint_with_the_least_nll_is_kept_and_the_last_beside_it(stage_args, turned, tmp_path, capsys):
    fit = stage_args("reward", "fit", tmp_path, *EPOCHS, f"--data.preferences_validation={turned}")
    main([*fit, "--model.learning_rate=0.1"])
    best, last = saved(tmp_path, "best"), saved(tmp_path, "last")
    assert (best["global_step"], last["global_step"]) == (6, 18)
    assert best[FIGURES_KEY]["val/nll"] < last[FIGURES_KEY]["val/nll"]
    told = capsys.readouterr().out
    assert "What the validation pairs say of this ensemble" in told
    assert "not shown to be better than a coin: right on 0% of 24 held-out pairs" in told

    # A run that goes on knows what was best.
    main([*fit, "--trainer.max_epochs=4", f"--ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}"])
    assert saved(tmp_path, "last")["global_step"] == 24
    assert saved(tmp_path, "best")["global_step"] == 6


@pytest.mark.parametrize("length", [EPOCHS, []])
def test_without_a_validation_the_latest_is_the_best(stage_args, tmp_path, length):
    main(stage_args("reward", "fit", tmp_path, *length, "--data.validation_fraction=0"))
    best, last = saved(tmp_path, "best"), saved(tmp_path, "last")
    assert best["global_step"] == last["global_step"]
    for name, value in last["state_dict"].items():
        assert torch.equal(best["state_dict"][name], value)


def test_a_test_ends_with_its_verdict_in_words_and_figures(stage_args, tmp_path, tiny_preferences_file, capsys):
    main(stage_args("reward", "fit", tmp_path, *EPOCHS))
    words = [
        f"--ckpt_path={tmp_path / 'checkpoints' / 'best.ckpt'}",
        f"--data.preferences_test={tiny_preferences_file}",
    ]
    main(stage_args("reward", "test", tmp_path, *words))
    found = json.loads((tmp_path / "test" / "evaluation.json").read_text())
    verdict = found["verdict"]
    assert verdict["num_pairs"] == 24
    assert verdict["accuracy"] == found["mean"]["accuracy"]
    assert 0 <= verdict["longer_chosen"] <= 1
    assert isinstance(verdict["cut_effect"], float)
    # Nothing has made the members comparable yet.
    assert verdict["sigma_constant_share"] is None
    told = capsys.readouterr().out
    assert "What the test pairs say of this ensemble" in told
    assert all(sentence in told for sentence in verdict["sentences"])
    assert "Temperature: 4 validation pairs are few to fit one on; with it, the ECE" in told
