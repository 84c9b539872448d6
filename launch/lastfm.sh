#!/usr/bin/env bash
# A small model from scratch on real LastFM: supervised start, then MASS-DPO and S-DPO from it, one table.
#   bash launch/lastfm.sh DIR [WORKDIR]    DIR holds lastfm-{train,val,test}.json[.gz] as S-DPO publishes them
# See launch/environment.sh for PYTHON and MASS_DPO_VENV.
data="$(cd "${1:?the folder with the LastFM files}" && pwd)"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
runs="${2:-runs/lastfm}"

install run "-e ."
train() { # train NAME FLAGS...
  say "$1"
  "$venv/bin/python" -m mass_dpo_jax.train --config=configs/tiny.py --workdir="$runs/$1" \
    --config.data.name=lastfm --config.data.path="$data" --config.data.max_test=0 \
    --config.data.max_validation=500 --config.train.eval_every=100 \
    --config.model.scratch.vocab_size=12288 "${@:2}"
}
train warm-start --config.method=sft --config.train.steps=1000 --config.train.learning_rate=3e-3 \
  --config.train.batch_size=64 --config.train.micro_batch_size=64
# One pass over 12,800 rows; the second run reads the reference that the first one computed.
for method in mass_dpo sdpo; do
  train "$method" --config.method="$method" --config.model.path="$runs/warm-start" \
    --config.train.steps=400 --config.train.learning_rate=3e-4 --config.data.max_train=12800
done
"$venv/bin/python" -m mass_dpo_jax.compare "$runs/warm-start" "$runs/sdpo" "$runs/mass_dpo"
