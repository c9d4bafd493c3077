#!/usr/bin/env bash
# Whether a container still does what it is there for. That lit-vapo runs is known, or the container would have ended;
# what else fails in silence is a GPU that has fallen off the bus, and a service that nobody reaches.
#
#   healthcheck [/proc/1/cmdline]
set -euo pipefail

mapfile -d '' -t words <"${1:-/proc/1/cmdline}"

if command -v nvidia-smi >/dev/null && [[ -e /dev/nvidiactl ]]; then
    timeout 20 nvidia-smi -L | grep -q '^GPU' || {
        echo 'no GPU answers'
        exit 1
    }
fi

if [[ " ${words[*]} " == *' reward serve '* ]]; then
    port=8000
    for i in "${!words[@]}"; do
        case ${words[i]} in
            --port=*) port=${words[i]#--port=} ;;
            --port) port=${words[i + 1]:-$port} ;;
        esac
    done
    timeout 5 bash -c "exec 3<>/dev/tcp/127.0.0.1/$port" 2>/dev/null || {
        echo "nobody listens on port $port"
        exit 1
    }
fi
