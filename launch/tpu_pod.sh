#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU slice (or of several, as a queued resource):
#   TPU=my-v5e-64 ZONE=us-west4-a bash launch/tpu_pod.sh --config=configs/llama3.py \
#       --config.model.path=/mnt/bucket/Llama-3.2-3B-Instruct --config.data.path=/mnt/bucket/pairs.jsonl \
#       --workdir=/mnt/bucket/runs/mine
#   TPU      name of the TPU VM; QUEUED=1: of a queued resource, whose nodes are slices
#   ZONE     its zone; PROJECT: its project, if it is not gcloud's default
#   FOLDER   of the project on the hosts (copied there from here); mass_dpo_jax without it
#   SETUP=0  the hosts have the project and its environment already
#   DRY=1    print the gcloud commands and run nothing
# The hosts need Python 3.11 or newer as python3. Model, data and --workdir must be seen by all of them
# at the same path: a Filestore share, or a bucket mounted with Cloud Storage FUSE (gcsfuse
# --implicit-dirs). With several slices, config.mesh.data goes across them and fsdp and tensor stay
# inside, where the interconnect is. The same command goes on from the newest checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

: "${TPU:?set TPU to the name of the TPU VM or queued resource}" "${ZONE:?set ZONE to its zone}"
folder="${FOLDER:-mass_dpo_jax}"
where=("--zone=$ZONE")
[ -z "${PROJECT:-}" ] || where+=("--project=$PROJECT")
if [ "${QUEUED:-0}" = 1 ]; then
  # All workers of all nodes.
  gcloud=(gcloud compute tpus queued-resources)
  where+=(--node=all --worker=all)
else
  gcloud=(gcloud compute tpus tpu-vm)
  where+=(--worker=all)
fi

do_or_show() {
  if [ "${DRY:-0}" = 1 ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

if [ "${SETUP:-1}" = 1 ]; then
  # setup.cfg and what it packages; no environments, runs or data.
  temporary="$(mktemp -d)"
  trap 'rm -rf "$temporary"' EXIT
  archive="$temporary/project.tgz"
  tar -czf "$archive" setup.cfg pyproject.toml README.md LICENSE mass_dpo_jax configs launch
  do_or_show "${gcloud[@]}" scp "$archive" "$TPU:project.tgz" "${where[@]}"
  do_or_show "${gcloud[@]}" ssh "$TPU" "${where[@]}" --command="mkdir -p $folder && tar -xzf project.tgz -C $folder && \
cd $folder && python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'"
fi

# Each host runs one process with its own chips; --distributed reads from the TPU's metadata who the
# others are (and with several slices, which slice this is).
run="cd $folder && exec .venv/bin/python -u -m mass_dpo_jax.train --distributed"
for flag in "$@"; do
  run+=" $(printf '%q' "$flag")"
done
do_or_show "${gcloud[@]}" ssh "$TPU" "${where[@]}" --command="$run"
