"""`lit-vapo completion`: shells run what it prints, and complete what there is."""

import shutil
import subprocess

import pytest

from lit_vapo.cli import COMMANDS, STAGES, following, main
from lit_vapo.commands.completion import SHELLS, script
from lit_vapo.commands.short_help import options

FIRSTS = {name.split()[0]: following(name.split()[0]) for name in COMMANDS}
# What bash does of itself, with the words as it splits them; and what functions of zsh would be told, printed.
ASKS = {
    "bash": 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _lit_vapo; printf "%s\\n" "${COMPREPLY[@]}"',
    "zsh": "words=(lit-vapo $@[2,-1]); CURRENT=$#; _lit_vapo",
}
STUBS = {
    "bash": "",
    "zsh": "compdef() { : }; compset() { : }; _files() { echo files }; compadd() { print -l -- ${(P)2} }\n",
}


def run(shell, *words):
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    text = STUBS[shell] + script(shell, FIRSTS) + "\n" + ASKS[shell]
    done = subprocess.run([shell, "-c", text, shell, "lit-vapo", *words], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("shell", SHELLS)
def test_the_words_of_the_table_come_first(shell):
    assert set(run(shell, "")) == {*FIRSTS, "--help", "--version"}
    for first in ("reward", "ppo", "study"):
        assert run(shell, first, "") == list(following(first))


@pytest.mark.parametrize("shell", SHELLS)
def test_options_and_classes_follow(shell):
    for stage in STAGES:
        names = [f"--{option.name}" for option in options(stage, "fit")]
        assert set(names) < set(run(shell, stage, "fit", "--"))
    assert {"VarianceAware", "WorstCase"} < set(run(shell, "ppo", "fit", "--model.objective", ""))
    assert "HeadEnsemble" in run(shell, "reward", "fit", "--config", "a.yaml", "--model.head", "")


def test_bash_filters_and_sees_through_an_equals_sign():
    assert run("bash", "re") == ["reward", "report"]
    assert run("bash", "ppo", "fit", "--model.kl") == ["--model.kl_coef", "--model.kl_budget"]
    assert run("bash", "ppo", "fit", "--model.objective", "=", "Wor") == ["WorstCase"]
    assert "Gae" in run("bash", "ppo", "fit", "--model.advantage", "=")
    # Files, by bash itself.
    assert run("bash", "ppo", "fit", "--config", "") == []


def test_zsh_sees_through_an_equals_sign():
    assert "WorstCase" in run("zsh", "ppo", "fit", "--model.objective=Wor")
    assert run("zsh", "ppo", "fit", "--config", "") == ["files"]


def test_the_command_prints_it(capsys):
    main(["completion", "bash"])
    assert capsys.readouterr().out == script("bash", FIRSTS) + "\n"
    with pytest.raises(ValueError, match="lit-vapo completion: expected bash or zsh, got 'fish'"):
        main(["completion", "fish"])
