#!/usr/bin/env bash
# Time PPO, RLOO, GRPO and reward ensembles beside those of peers, and say how cost grows. Called by `make bench`.
#
#   PAIRS=5                   alternating runs of ours and theirs; ratios are taken pair by pair
#   MODEL=runs/demo/policy-base    a real model to time as well, beside a small random one (default: the demo's, if made)
#
# Each peer gets an environment of its own below build/peers, once. Tables go to build/bench/*.md, and each run of PPO to
# build/bench/*/answers.json. Hours, on two cores; nothing else should run meanwhile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${VENV:-.venv}/bin/python
PAIRS=${PAIRS:-5}
MODEL=${MODEL:-runs/demo/policy-base}
OUT=build/bench
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

# An environment of this name with these packages.
peer() {
    local folder=build/peers/$1
    shift
    if [[ ! -e $folder/complete ]]; then
        rm -rf "$folder"
        "$PYTHON" -m venv "$folder"
        "$folder/bin/pip" install --quiet --disable-pip-version-check "$@"
        touch "$folder/complete"
    fi
}

# A script of benchmarks/, and what it prints in a file of this name.
measure() {
    local name=$1
    shift
    printf '\n$ python %s\n' "$*"
    "$PYTHON" "$@" | tee "$OUT/$name.md"
}

mkdir -p "$OUT"
peer trl -c constraints-cpu.txt trl==1.12.0 peft
peer rewarduq rewarduq==0.1.0 'transformers<5'
TRL=(--peer_python build/peers/trl/bin/python --pairs "$PAIRS")

measure small benchmarks/ppo_speed.py "${TRL[@]}" --work "$OUT/small"
# Prompts and responses of mixed lengths, up to 256 tokens.
measure mixed benchmarks/ppo_speed.py "${TRL[@]}" --work "$OUT/mixed" --sides '[trl_lora,ours]' \
    --shortest_prompt 8 --prompt_length 200 --response_length 56
if [[ -e $MODEL/config.json ]]; then
    measure model benchmarks/ppo_speed.py "${TRL[@]}" --work "$OUT/model" --sides '[trl_lora,ours]' \
        --model "$MODEL" --epochs 2 --iterations 2
fi
measure rewards benchmarks/reward_uq.py --repetitions "$PAIRS" \
    --peer_python build/peers/rewarduq/bin/python --trl_python build/peers/trl/bin/python
measure scaling benchmarks/scaling.py --work "$OUT/scaling" --picture "$OUT/scaling.png"
