"""The notebook runs, and `import lit_vapo as lv` has what it uses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jsonargparse._util import get_import_path
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lit_vapo

ROOT = Path(__file__).resolve().parents[2]


def test_the_notebook_runs(tiny_model_dir, tiny_preferences_file, tiny_prompts_file, tmp_path):
    cells = json.loads((ROOT / "examples/align.ipynb").read_text())["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert codes[0]["metadata"]["tags"] == ["parameters"]
    assert all(cell["outputs"] == [] for cell in codes)
    own = {"model": tiny_model_dir, "preferences": tiny_preferences_file, "prompts": tiny_prompts_file}
    values = "".join(f"{name} = {str(value)!r}\n" for name, value in own.items()) + f"output = {str(tmp_path)!r}\n"
    script = "\n".join([values, *("".join(cell["source"]) for cell in codes[1:])])
    # Less of everything tells as much.
    shorter = {
        "max_epochs=10": "max_epochs=2",
        "max_epochs=1,": "max_epochs=1, limit_train_batches=2,",
        "max_new_tokens=32": "max_new_tokens=6",
        '"max_prompt_length": 256': '"max_prompt_length": 32, "batch_size": 4',
    }
    for long, short in shorter.items():
        assert long in script
        script = script.replace(long, short)
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert lit_vapo.RewardModel.from_pretrained(tmp_path / "ensemble").head.calibrated
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "policy")


@pytest.mark.parametrize("name", lit_vapo.__all__)
def test_every_name_is_there(name):
    assert getattr(lit_vapo, name).__name__.rpartition(".")[2] == name
    assert name in dir(lit_vapo)


def test_saved_files_name_classes_by_their_own_package():
    assert get_import_path(lit_vapo.objectives.VarianceAware) == "lit_vapo.objectives.VarianceAware"
    assert get_import_path(lit_vapo.rewards.FunctionReward) == "lit_vapo.rewards.FunctionReward"


def test_a_name_that_is_not_there_is_refused_as_in_any_module():
    with pytest.raises(AttributeError, match="module 'lit_vapo' has no attribute 'PPO'"):
        lit_vapo.PPO  # noqa: B018


def test_importing_the_package_loads_nothing():
    code = "import sys, lit_vapo; print('torch' in sys.modules, 'yaml' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "False False\n"
