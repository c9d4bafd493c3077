#!/usr/bin/env bash
# Time PPO, RLOO, GRPO and reward ensembles beside those of peers, and say how cost grows. Called by `make bench`.
#
#   PAIRS=5                   alternating runs of ours and theirs; ratios are taken pair by pair
#   MODEL=FOLDER              a model to time as well, beside a small random one (default: that of the demo, if there is one)
#
# Each peer gets an environment of its own below build/peers, once. Tables go to runs/bench/*.md, and each run of PPO to
# runs/bench/*/answers.json. Hours, on two cores; nothing else should run meanwhile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
PAIRS=${PAIRS:-5}
OUT=runs/bench
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

if [[ -n ${MODEL:-} && ! -e $MODEL/config.json ]]; then
    printf 'bench: MODEL=%s: expected the folder of a model, with its config.json\n' "$MODEL" >&2
    exit 1
fi
MODEL=${MODEL:-runs/demo/policy-base}

# An environment of this name with these packages, and with our build of torch.
peer() {
    local folder=build/peers/$1 key="$* $("$VENV/bin/pip" freeze | grep '^torch==')"
    shift
    if [[ -e $folder/complete && $(<"$folder/complete") == "$key" ]]; then
        return
    fi
    rm -rf "$folder"
    "$VENV/bin/python" -m venv "$folder"
    "$VENV/bin/pip" freeze | grep '^torch==' >"$folder/torch.txt"
    "$folder/bin/pip" --disable-pip-version-check install -qq -c "$folder/torch.txt" \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$@"
    printf '%s\n' "$key" >"$folder/complete"
}

# A script of benchmarks/, and what it prints in a file of this name.
measure() {
    local name=$1
    shift
    printf '\n$ python %s\n' "$*"
    "$VENV/bin/python" "$@" | tee "$OUT/$name.md"
}

mkdir -p "$OUT"
# TRL imports requests, and does not ask for it.
peer trl -c "$VENV/constraints.txt" trl==1.12.0 peft requests
peer rewarduq rewarduq==0.1.0 'transformers<5'
TRL=(--peer_python build/peers/trl/bin/python --pairs "$PAIRS")

measure small benchmarks/ppo_speed.py "${TRL[@]}" --work "$OUT/small"
# Prompts and responses of mixed lengths, up to 256 tokens.
measure mixed benchmarks/ppo_speed.py "${TRL[@]}" --work "$OUT/mixed" --sides '[trl_lora,ours]' \
    --shortest_prompt 8 --prompt_length 200 --response_length 56
if [[ -e $MODEL/config.json ]]; then
    measure "${MODEL//\//_}" benchmarks/ppo_speed.py "${TRL[@]}" --work "$OUT/${MODEL//\//_}" \
        --sides '[trl_lora,ours]' --model "$MODEL" --epochs 2 --iterations 2
fi
measure rewards benchmarks/reward_uq.py --repetitions "$PAIRS" \
    --peer_python build/peers/rewarduq/bin/python --trl_python build/peers/trl/bin/python
measure scaling benchmarks/scaling.py --work "$OUT/scaling" --picture "$OUT/scaling.png"
