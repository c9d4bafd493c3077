#!/usr/bin/env bash
# The demo, from data to report: the ordinary commands, each printed before it runs so that you can copy it.
# `make demo` calls this with the environment's commands on the PATH. By hand: source .venv/bin/activate first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

OUT=runs/demo # the configs under configs/*/demo.yaml name the same folder

# Model and data come from installed packages. With this set, an attempt to reach a hub is an error, not a wait.
export HF_HUB_OFFLINE=1

run() {
    printf '\n\033[1m$'
    printf ' %q' "$@"
    printf '\033[0m\n'
    "$@"
}

# A run folder is never overwritten silently, so a second demo starts by removing the results of the first.
for old in reward ensemble ppo policy; do
    if [[ -e $OUT/$old ]]; then
        run rm -rf "$OUT/$old"
    fi
done

run python -m examples.sentiment.prepare --output "$OUT"
run lit-vapo reward fit --config configs/reward/demo.yaml
run lit-vapo reward test --config configs/reward/demo.yaml --ckpt_path "$OUT/reward/checkpoints/last.ckpt"
run lit-vapo export --checkpoint "$OUT/reward/checkpoints/last.ckpt" --output "$OUT/ensemble"
run lit-vapo ppo fit --config configs/ppo/demo.yaml
run lit-vapo ppo test --config configs/ppo/demo.yaml --ckpt_path "$OUT/ppo/checkpoints/last.ckpt"
run lit-vapo export --checkpoint "$OUT/ppo/checkpoints/last.ckpt" --output "$OUT/policy"
run python -m examples.sentiment.report --output "$OUT"
