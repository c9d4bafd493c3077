#!/usr/bin/env bash
# Have the Dockerfile and the files of deploy/ looked at by the tools that know them: `make validate`.
# They are installed into an environment of their own inside that of the project (some 700 MB, most of it SkyPilot).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
tools=$VENV/validators
if [[ ! -x $tools/bin/sky ]]; then
    "$VENV/bin/python" -m venv "$tools"
    "$VENV/bin/python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["validators"], sep="\n")' |
        "$tools/bin/python" -m pip --disable-pip-version-check install -qq -r /dev/stdin
fi
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$VENV/bin/python" -m pytest -q -n 0 -p no:cacheprovider tests/deploy
