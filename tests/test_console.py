"""How a command ends and prints."""

import os
import subprocess
import sys

import pytest

from lit_vapo.commands.options import Parser
from lit_vapo.console import lasting, reported
from lit_vapo.folders import check_new, write_whole
from lit_vapo.functional import gae
from lit_vapo.models.pretrained import Lora


def ending(capsys, action):
    with pytest.raises(SystemExit) as end, reported():
        action()
    return end.value.code, capsys.readouterr().err


def test_what_the_package_refuses_is_one_message(capsys, tmp_path):
    (tmp_path / "mine").touch()
    code, err = ending(capsys, lambda: check_new(tmp_path, "--output"))
    assert code == 2
    assert err == f"lit-vapo: error: --output: expected a new or empty folder, got '{tmp_path}' with files in it\n"


def test_what_the_system_refuses_is_one_message(capsys, tmp_path):
    (tmp_path / "mine").touch()
    assert ending(capsys, lambda: (tmp_path / "gone" / "x").read_text()) == (
        2,
        f"lit-vapo: error: {tmp_path}/gone/x: No such file or directory\n",
    )
    code, err = ending(capsys, lambda: write_whole(tmp_path / "mine" / "x", ""))
    assert (code, err) == (2, f"lit-vapo: error: {tmp_path}/mine: File exists\n")


def test_what_cannot_be_made_of_options_is_one_message(capsys):
    parser = Parser(prog="some command")
    parser.add_argument("--lora", type=Lora | None)
    given = parser.parse_args(["--lora.alpha=0"])
    code, err = ending(capsys, lambda: parser.instantiate_classes(given))
    assert code == 2
    assert "model.lora.alpha: expected a number above 0, got 0.0" in err


@pytest.mark.parametrize(
    "action",
    [
        lambda: int("x"),  # raised by nobody's `raise`
        lambda: (lambda a, b: None)(*[1]),
        lambda: {}["key"],
        lambda: gae(None, None, None),  # a surprise inside the package
        lambda: exec("raise ValueError('of somebody else')"),
    ],
)
def test_a_bug_keeps_its_traceback(action):
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)), reported():
        action()


def test_who_asks_sees_the_traceback(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_VAPO_DEBUG", "1")
    (tmp_path / "mine").touch()
    code, err = ending(capsys, lambda: check_new(tmp_path, "--output"))
    assert code == 2
    assert "Traceback" in err


def test_processes_of_a_distributed_run_say_which_they_are(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    (tmp_path / "mine").touch()
    code, err = ending(capsys, lambda: check_new(tmp_path, "--output"))
    assert code == 2
    assert err.endswith("(process 1)\n")


def test_an_interruption_is_no_success(capsys):
    def interrupt():
        raise KeyboardInterrupt

    assert ending(capsys, interrupt) == (130, "")


def test_letters_that_a_terminal_lacks_are_replaced(tmp_path):
    with open(tmp_path / "out", "w", encoding="latin-1") as stream:
        print("σ² 方", file=(out := lasting(stream)), flush=True)
        assert out.encoding == "latin-1"
    assert (tmp_path / "out").read_bytes() == b"?\xb2 ?\n"


def test_a_reader_that_goes_away_is_no_error():
    read, write = os.pipe()
    with open(write, "w", encoding="utf-8") as stream:
        out = lasting(stream)
        os.close(read)
        for _ in range(3):
            print("x" * 100_000, file=out, flush=True)


def test_the_command_line_ends_with_code_2_and_one_line():
    code = "import sys; sys.argv[1:] = ['dpo', 'fit']; from lit_vapo.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[0].startswith("lit-vapo: error: expected a stage")
    assert "Traceback" not in done.stderr
