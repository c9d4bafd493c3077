"""Classes to choose are known by their own names, on the command line and in files; full paths go on working."""

import subprocess
import sys

import pytest
import torch
from helpers import CONFIGS, last

from lit_vapo.cli import main


def settings(run):
    return torch.load(last(run), weights_only=True)["hyper_parameters"]


@pytest.mark.parametrize(
    ("objective", "advantage"),
    [
        ("LowerConfidence", "Rloo"),
        ("lit_vapo.objectives.LowerConfidence", "lit_vapo.advantages.Rloo"),
        ("lit_vapo.objectives.lower_confidence.LowerConfidence", "lit_vapo.advantages.rloo.Rloo"),
    ],
)
def test_ppo_takes_names_and_paths(stage_args, tiny_ensemble_dir, tmp_path, objective, advantage):
    chosen = [f"--model.objective={objective}", "--model.objective.penalty=0.7", f"--model.advantage={advantage}"]
    source = ["--model.reward=EnsembleReward", f"--model.reward.folder={tiny_ensemble_dir}"]
    main(stage_args("ppo", "fit", tmp_path / "run", *chosen, *source, "--model.sampling.num_responses=2"))
    held = settings(tmp_path / "run")
    # What is kept says where a class is, however it was given.
    assert held["objective"]["class_path"] == "lit_vapo.objectives.lower_confidence.LowerConfidence"
    assert held["objective"]["init_args"] == {"penalty": 0.7}
    assert held["advantage"]["class_path"] == "lit_vapo.advantages.rloo.Rloo"
    assert held["reward"]["class_path"] == "lit_vapo.rewards.ensemble.EnsembleReward"
    assert held["reward"]["init_args"]["folder"] == str(tiny_ensemble_dir)
    (saved,) = (tmp_path / "run").rglob("config.yaml")
    main(["ppo", "fit", f"--config={saved}", f"--trainer.default_root_dir={tmp_path / 'again'}"])
    assert settings(tmp_path / "again") == held
    main(["export", f"--checkpoint={last(tmp_path / 'run')}", f"--output={tmp_path / 'out'}"])


def test_a_folder_is_a_folder_and_no_name(stage_args, tiny_ensemble_dir, tmp_path, monkeypatch):
    main(stage_args("ppo", "fit", tmp_path / "run", model__reward=tiny_ensemble_dir))
    assert settings(tmp_path / "run")["reward"] == str(tiny_ensemble_dir)
    for name in ("runs/reward/ensemble", "EnsembelReward"):
        message = f"expected a folder with ensemble.json .*, got .*{name}"
        with pytest.raises(ValueError, match=message):
            main(stage_args("ppo", "fit", tmp_path / "other", model__reward=name))


@pytest.mark.parametrize(
    ("head", "kept"),
    [
        ("BayesianLinear", "lit_vapo.rewards.members.BayesianLinear"),
        ("lit_vapo.rewards.members.bayesian.BayesianLinear", "lit_vapo.rewards.members.bayesian.BayesianLinear"),
    ],
)
def test_the_reward_stage_takes_names_and_paths(stage_args, tmp_path, capsys, head, kept):
    with pytest.raises(SystemExit):
        main([*stage_args("reward", "fit", tmp_path / "run"), f"--model.head={head}", "--print_config"])
    assert f"class_path: {kept}" in capsys.readouterr().out


NEW = """
from lit_vapo.objectives.base import Objective, Score, ones_like_mean

class Halved(Objective):
    '''Half the mean.'''

    def forward(self, estimate):
        return Score(estimate.mean / 2, ones_like_mean(estimate))
"""


def test_a_new_file_in_a_folder_is_known_by_name(tmp_path):
    """Without an entry anywhere: in another process, since this one keeps its classes."""
    (tmp_path / "halved.py").write_text(NEW)
    code = f"""
import lit_vapo.objectives as folder
folder.__path__.append({str(tmp_path)!r})
from lit_vapo.plugins import import_all
import_all(folder.__name__, folder.__path__)
from jsonargparse import ArgumentParser
parser = ArgumentParser()
parser.add_argument("--objective", type=folder.Objective)
print(parser.parse_args(["--objective=Halved"]).objective.class_path)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "lit_vapo.objectives.halved.Halved\n"


def test_every_folder_of_classes_to_choose_looks_for_new_files():
    """In another process, since this one has imported them."""
    code = """
import lit_vapo.plugins as plugins
found, plugins.import_all = [], lambda package, path: found.append(package)
import lit_vapo.advantages, lit_vapo.objectives, lit_vapo.rewards
print(*sorted(found))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        f"lit_vapo.{name}" for name in ("advantages", "objectives", "rewards", "rewards.members")
    ]
