"""Scripts for clusters and sweeps: they call the command as it is."""

import os
import subprocess

import pytest
import yaml
from helpers import CONFIGS

DEPLOY = CONFIGS.parent / "deploy"


@pytest.fixture
def bash(tmp_path):
    """Run a script with `lit-vapo` replaced by one that prints its words."""
    fake = tmp_path / "lit-vapo"
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$OMP_NUM_THREADS" "$@"\n')
    fake.chmod(0o755)

    def call(*words, **variables):
        env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables
        return subprocess.run(words, env=env, capture_output=True, text=True, check=False, cwd=CONFIGS.parent)

    return call


def test_slurm_tasks_take_their_share(bash):
    script = str(DEPLOY / "study.slurm")
    slurm = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "15", "SLURM_CPUS_PER_TASK": "4"}
    done = bash("bash", script, "a.yaml", "--repetitions", "9", **slurm)
    expected = "1 study run --config a.yaml --shard 3/16 --jobs 4 --threads 1 --repetitions 9"
    assert done.stdout.split() == expected.split()
    # One process with all threads.
    done = bash("bash", script, "a.yaml", JOBS="1", **slurm)
    assert done.stdout.split() == ["4", *expected.replace("--jobs 4 --threads 1", "--jobs 1 --threads 4").split()[1:-2]]
    done = bash("bash", script, "a.yaml")
    assert done.returncode != 0
    assert "sbatch --array=0-N" in done.stderr


def test_sweep_runs_have_folders_of_their_own(bash):
    sweep = yaml.safe_load((DEPLOY / "sweep.yaml").read_text())
    values = {name: given["values"][0] for name, given in sweep["parameters"].items()}
    arguments = [f"--{name}={value}" for name, value in values.items()]
    command = [word for part in sweep["command"] for word in (arguments if part == "${args}" else [part])]
    words = bash(*command, WANDB_RUN_ID="xyz", OMP_NUM_THREADS="1").stdout.split()
    assert words[1:3] == ["ppo", "fit"]
    assert "--trainer.default_root_dir=runs/sweep/xyz" in words
    assert words[-2:] == ["--seed_everything=0", f"--model.objective={values['model.objective']}"]
    for word in words:
        assert not word.startswith("configs/") or (CONFIGS.parent / word).is_file()
