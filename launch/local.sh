#!/usr/bin/env bash
# Runs a command as several processes on this machine, with simulated CPU devices: to try out what
# will run on several hosts.
#   bash launch/local.sh 2 4 mass_dpo_jax.train --config=configs/tiny.py --workdir=runs/two --config.mesh.fsdp=4
# is two processes of four devices each. Process 0 speaks here; of the others, what goes wrong.
#   PORT    of 127.0.0.1, where process 0 is found by the others; one that is free without it
#   PYTHON  the interpreter to use; .venv/bin/python without it, or else python3
# Ends with the first exit status that is not 0; then all processes have ended.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ $# -lt 3 ] || ! [[ "$1" =~ ^[1-9][0-9]*$ && "$2" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: bash launch/local.sh PROCESSES DEVICES_EACH MODULE [FLAGS...], for example" >&2
  echo "  bash launch/local.sh 2 4 mass_dpo_jax.train --config=configs/tiny.py --workdir=runs/two" >&2
  exit 2
fi
processes="$1" devices="$2"
shift 2

python="${PYTHON:-.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
port="${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}"

export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
export TOKENIZERS_PARALLELISM=false

children=()
trap 'kill "${children[@]}" 2>/dev/null || true' INT TERM
for ((process = 0; process < processes; process++)); do
  "$python" -u -m "$@" --coordinator_address="127.0.0.1:$port" \
    --num_processes="$processes" --process_id="$process" &
  children+=($!)
done

status=0
for child in "${children[@]}"; do
  code=0
  wait "$child" || code=$?
  [ "$status" -ne 0 ] || status="$code"
done
exit "$status"
