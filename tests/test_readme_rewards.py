"""The README's blocks on rewards of one's own run as they stand, on tiny models."""

import re
import shutil
import sys

import helpers
import public_helpers
import pytest
import yaml
from test_readme import ROOT, blocks, commands

from lit_vapo.cli import main

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("### Rewards of your own")[2].partition("\n## ")[0]
# What a tiny model and a CPU need.
SMALL = [
    *("--trainer.accelerator=cpu", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0"),
    *("--data.batch_size=2", "--data.max_prompt_length=32", "--model.sampling.max_new_tokens=4"),
    *("--model.num_reference=4", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
]
COMMANDS = [words for block in blocks(SECTION, "bash") for words in commands(block)]


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_model_dir, tiny_ensemble_dir, tiny_preferences_file, tiny_prompts_file):
    """A folder with the files that the README speaks of."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(tiny_model_dir, tmp_path / "my" / "model")
    shutil.copytree(tiny_ensemble_dir, tmp_path / "runs" / "my" / "ensemble")
    shutil.copy(tiny_preferences_file, tmp_path / "preferences.jsonl")
    shutil.copy(tiny_prompts_file, tmp_path / "prompts.jsonl")
    for seed, name in enumerate(("their", "other")):
        public_helpers.classifier(tmp_path / name / "reward-model", seed=seed)
    for block in blocks(README, "yaml", "python"):
        named = re.match(r"# (my_\w+\.(yaml|py))\n", block)
        if named:
            (tmp_path / named.group(1)).write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for path in tmp_path.glob("my_*.py"):
        sys.modules.pop(path.stem, None)


def test_there_are_blocks_to_run():
    assert len(COMMANDS) >= 3


@pytest.mark.parametrize("words", COMMANDS, ids=range(len(COMMANDS)))
def test_a_command_runs(words, place):
    assert words[:3] == ["lit-vapo", "ppo", "fit"]
    main([*words[1:], *SMALL, "--trainer.default_root_dir=run"])
    figures = (place / "run" / "logs" / "version_0" / "metrics.csv").read_text()
    config = yaml.safe_load((place / "run" / "logs" / "version_0" / "config.yaml").read_text())
    sources = config["model"]["reward"].get("init_args", {}).get("sources", {})
    assert all(f"train/reward_{name}" in figures for name in sources)
    assert helpers.last(place / "run").is_file()
