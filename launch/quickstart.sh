#!/usr/bin/env bash
# Trains a small model on a made-up recommendation world: set-up, warm start, MASS-DPO, table, picture.
# Arguments go on to the program. See launch/environment.sh for PYTHON and MASS_DPO_VENV.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install run "-e ."
say "Training in runs/quickstart (about two minutes on two cores)"
exec "$venv/bin/python" -m examples.quickstart --config=configs/tiny.py \
  --workdir=runs/quickstart "$@"
