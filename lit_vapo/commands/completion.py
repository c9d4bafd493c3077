"""`lit-vapo completion`: what a shell needs to complete commands and options; nothing heavy is imported to say it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from lit_vapo.commands.short_help import OPTIONS, options

COMMON, MORE = ("--help", "--version"), ("--help", "--help_all", "--print_config")
PARTS = ("fit", "validate", "test", "predict")
# What may come after the words so far: commands, then options, then the values of one.
WORDS = """\
_lit_vapo_words() {
    case "$1" in
%s
    esac
}
"""
SHELLS = {
    "bash": r"""
_lit_vapo() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} place="" found
    # Bash makes three words of --option=value.
    if [[ $word == "=" ]]; then word=""; elif [[ $before == "=" ]]; then before=${COMP_WORDS[COMP_CWORD-2]}; fi
    if ((COMP_CWORD == 2)); then place=${COMP_WORDS[1]}
    elif ((COMP_CWORD > 2)); then place="${COMP_WORDS[1]} ${COMP_WORDS[2]}"; fi
    if ((COMP_CWORD > 2)) && [[ $word != -* ]]; then place+=" $before"; fi
    COMPREPLY=($(compgen -W "$(_lit_vapo_words "$place")" -- "$word"))
}
complete -o default -F _lit_vapo lit-vapo""",
    "zsh": r"""
_lit_vapo() {
    local word=$words[CURRENT] place="" found
    if ((CURRENT == 3)); then place=$words[2]
    elif ((CURRENT > 3)); then place="$words[2] $words[3]"; fi
    if ((CURRENT > 3)) && [[ $word == --*=* ]]; then place+=" ${word%%=*}"; compset -P '*='
    elif ((CURRENT > 3)) && [[ $word != -* ]]; then place+=" $words[CURRENT-1]"; fi
    found=($(_lit_vapo_words "$place"))
    if (($#found)); then compadd -a found; else _files; fi
}
compdef _lit_vapo lit-vapo""",
}


def script(shell: str, firsts: Mapping[str, Sequence[str]]) -> str:
    """What a shell runs to know the commands.

    Args:
        shell: One of `SHELLS`.
        firsts: The words that may follow each first one.
    """
    places = {"''": [*firsts, *COMMON], **{f"'{first}'": words for first, words in firsts.items()}}
    for stage, part in ((stage, part) for stage in OPTIONS for part in PARTS if part in firsts[stage]):
        found = options(stage, part)
        places[f"'{stage} {part}'"] = ["--config", *(f"--{option.name}" for option in found), *MORE]
        places |= {f"'{stage} '*' --{option.name}'": option.choices for option in found}
    cases = "\n".join(f"        {place}) echo '{' '.join(words)}' ;;" for place, words in places.items() if words)
    return WORDS % cases + SHELLS[shell]


def print_script(words: Sequence[str], firsts: Mapping[str, Sequence[str]]) -> None:
    """Parse a command line without `lit-vapo completion`, and print the script.

    Raises:
        ValueError: There is no such shell.
    """
    about = 'Completion of commands and options: eval "$(lit-vapo completion bash)"'
    parser = argparse.ArgumentParser(prog="lit-vapo completion", description=about, exit_on_error=False)
    parser.add_argument("shell", nargs="?", default="", help=f"One of {', '.join(SHELLS)}.")
    shell = parser.parse_known_args(list(words))[0].shell
    if shell not in SHELLS:
        raise ValueError(f"lit-vapo completion: expected {' or '.join(SHELLS)}, got {shell!r}")
    print(script(shell, firsts))
