"""What is left out of what a run prints, and what is not."""

import logging
import subprocess
import sys

import pytest
from transformers.utils import logging as transformers_logging

from lit_vapo.cli import main
from lit_vapo.commands import notices
from lit_vapo.models.policy import Policy
from lit_vapo.models.pretrained import Pretrained, load_backbone


def test_a_run_does_not_advertise(stage_args, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        main(stage_args("sft", "fit", tmp_path / "run"))
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("GPU available") for line in said)
    assert not any("Tip" in line or "TPU" in line for line in said)


@pytest.mark.parametrize(
    ("category", "file", "shown"),
    [
        (UserWarning, notices.__file__, "warning: data.x: left out 1 row\n"),
        (FutureWarning, notices.__file__, f"{notices.__file__}:7: FutureWarning: data.x: left out 1 row\n"),
        (UserWarning, "/x/torch/nn.py", "/x/torch/nn.py:7: UserWarning: data.x: left out 1 row\n"),
    ],
)
def test_a_warning_of_ours_is_a_sentence(category, file, shown):
    assert notices._sentence("data.x: left out 1 row", category, file, 7, "") == shown


def test_a_warning_is_printed_so_once_notices_are_silenced():
    # Pytest catches warnings before they are printed.
    code = "import warnings; from lit_vapo.commands.notices import silence; silence(); silence()\n"
    code += "warnings.warn_explicit('say', UserWarning, '/x/lit_vapo/data.py', 3)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr == "warning: say\n"


def test_from_python_models_are_read_and_written_quietly(tiny_model_dir, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()
    try:
        load_backbone(Pretrained(tiny_model_dir))  # without its head
        Policy(Pretrained(tiny_model_dir), None, keep_reference=False).save_pretrained(tmp_path / "policy")
        printed = capfd.readouterr()
        # For whatever else a script does with transformers, all is as it was.
        assert transformers_logging.get_verbosity() == logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity(before)
    assert printed.out + printed.err == ""
