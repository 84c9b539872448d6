#!/usr/bin/env bash
# The paper's tables and figures: trains model x data set x method x seed, the ablations of beta and n,
# and writes the report. Run again, it goes on with what is not finished.
#   bash launch/paper.sh LLAMA=DIR QWEN=DIR LASTFM=DIR ... [--dry-run]
# Models, folders as downloaded from Hugging Face (those not given are left out):
#   LLAMA QWEN SMOLLM     trained with configs/llama3.py, qwen3.py, smollm3.py
#   SMOLLM2               SmolLM2-135M-Instruct, with configs/smollm2.py: the grid of QASC and LastFM in
#                         a night on two CPU cores, scaled down in rows, steps and batch
#   SCRATCH               a config file, such as configs/tiny.py: a small model from random weights
# Data sets (those not given are left out): LASTFM MOVIELENS MEDMCQA QASC, as config.data.path takes
# them; SYNTHETIC=1 needs none. What to run, with its default (all of these may be environment variables):
#   METHODS   "mass_dpo sdpo dpo_k dmpo dpo pl_sampled pl_all sdpo+selection.refresh=once mppo"
#             a method, with +FIELD=VALUE for settings of its own, such as
#             pl_sampled+selection.draw=local
#   ABLATED   "mass_dpo sdpo"   the methods of the ablations
#   BETAS     "0.1 0.5 1.0"     NEGATIVES "1 3 5"     "" leaves an ablation out
#   SEEDS     "0 1 2"
#   SFT       ""                1: a supervised stage first, from which the methods start
#   EXTRA     ""                flags for every run, such as "--config.train.steps=50"; method, beta, n,
#                               seed and what a method has of its own come after them
#   OUT       runs/paper        KIND/MODEL/DATA/METHOD/seedN below it, and report/; KIND is main,
#                               table4a (betas) or table4b (n)
# --dry-run prints the commands. A run that fails does not stop the others: it is listed at the end, and
# the exit status is 1; each run's output is in its log.txt. See launch/environment.sh for PYTHON and
# MASS_DPO_VENV.
set -euo pipefail

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

models="LLAMA QWEN SMOLLM SMOLLM2"
datasets="LASTFM MOVIELENS MEDMCQA QASC"
dry_run=""
for word in "$@"; do
  name="${word%%=*}"
  case "$word" in
    --dry-run) dry_run=1 ;;
    -h | --help) usage; exit ;;
    *=*)
      case " $models $datasets SCRATCH SYNTHETIC METHODS ABLATED BETAS NEGATIVES SEEDS SFT EXTRA OUT " in
        *" $name "*) printf -v "$name" %s "${word#*=}" ;;
        *) fail "$name: unknown; see bash $0 --help" ;;
      esac ;;
    *) fail "unexpected argument '$word'; see bash $0 --help" ;;
  esac
done
METHODS="${METHODS-mass_dpo sdpo dpo_k dmpo dpo pl_sampled pl_all sdpo+selection.refresh=once mppo}"
ABLATED="${ABLATED-mass_dpo sdpo}"
BETAS="${BETAS-0.1 0.5 1.0}"
NEGATIVES="${NEGATIVES-1 3 5}"
SEEDS="${SEEDS-0 1 2}"
main_beta=0.1
main_n=3

# Folders are named from where the command was given; the runs are made in the project's root.
some_model="${SCRATCH:-}"
some_data="${SYNTHETIC:-}"
for name in $models $datasets; do
  [ -n "${!name:-}" ] || continue
  [ -e "${!name}" ] || fail "$name=${!name}: no such file or folder"
  [ "${!name#/}" != "${!name}" ] || printf -v "$name" %s "$PWD/${!name}"
  case " $models " in *" $name "*) some_model=1 ;; *) some_data=1 ;; esac
done
[ -n "$some_model" ] || fail "no model: give LLAMA=DIR, QWEN=DIR, SMOLLM=DIR, SMOLLM2=DIR or SCRATCH=configs/tiny.py"
[ -n "$some_data" ] || fail "no data: give LASTFM=DIR, MOVIELENS=DIR, MEDMCQA=DIR, QASC=DIR or SYNTHETIC=1"
out="${OUT:-runs/paper}"
[ -z "${OUT:-}" ] || [ "${OUT#/}" != "$OUT" ] || out="$PWD/$OUT"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[ -z "${SCRATCH:-}" ] || [ -f "$SCRATCH" ] || fail "SCRATCH=$SCRATCH: no such file in the project"
[ -n "$dry_run" ] || install run "-e ."

export PYTHONUNBUFFERED=1
failed=()
seen="|"
finished() { grep -qs '"finished": true' "$1/metrics.json"; }

# cell KIND METHOD BETA N: one run of $model on $data from $start; sets $cell to its folder.
cell() {
  local method="$2" settings="" field status=0
  cell="$out/$1/$model/$data/$method$5/seed$seed"
  case "$seen" in *"|$cell|"*) return ;; esac
  seen="$seen$cell|"
  if finished "$cell"; then
    say "finished: $cell"
    return
  fi
  local command=("$venv/bin/python" -m mass_dpo_jax.train --config="$config" --workdir="$cell")
  [ -z "$start" ] || command+=(--config.model.path="$start")
  command+=(--config.data.name="$data")
  [ -z "$path" ] || command+=(--config.data.path="$path")
  # shellcheck disable=SC2206  # several flags in one variable
  command+=(${EXTRA:-})
  command+=(--config.method="${method%%+*}" --config.beta="$3" --config.num_negatives="$4" --config.seed="$seed")
  [ "$method" = "${method%%+*}" ] || settings="${method#*+}"
  for field in ${settings//+/ }; do
    command+=(--config."$field")
  done
  if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    echo
    return
  fi
  if [ -n "$needs" ] && ! finished "$needs"; then
    failed+=("$cell (its supervised stage did not finish)")
    return
  fi
  say "$cell"
  mkdir -p "$cell"
  "${command[@]}" 2>&1 | tee "$cell/log.txt" || status=$?
  [ "$status" != 130 ] || exit 130
  [ "$status" = 0 ] || failed+=("$cell (exit status $status)")
}

# All runs of $model on $data with $seed.
runs() {
  local method beta n needs="" folder
  if [ -n "${SFT:-}" ]; then
    cell main sft "$main_beta" "$main_n" ""
    start="$cell"
    needs="$cell"
  fi
  for method in $METHODS; do
    cell main "$method" "$main_beta" "$main_n" ""
  done
  # The main setting's column of an ablation is the main run.
  for method in $ABLATED; do
    for beta in $BETAS; do
      folder="table4a -beta$beta"
      [ "$beta" != "$main_beta" ] || folder="main "
      cell "${folder% *}" "$method" "$beta" "$main_n" "${folder#* }"
    done
    for n in $NEGATIVES; do
      folder="table4b -n$n"
      [ "$n" != "$main_n" ] || folder="main "
      cell "${folder% *}" "$method" "$main_beta" "$n" "${folder#* }"
    done
  done
}

# Seed by seed, so that a first look at everything comes early.
for seed in $SEEDS; do
  for name in $models SCRATCH; do
    [ -n "${!name:-}" ] || continue
    case "$name" in
      LLAMA) config=configs/llama3.py ;;
      QWEN) config=configs/qwen3.py ;;
      SMOLLM) config=configs/smollm3.py ;;
      SMOLLM2) config=configs/smollm2.py ;;
      SCRATCH) config="$SCRATCH" ;;
    esac
    for set in $datasets SYNTHETIC; do
      [ -n "${!set:-}" ] || continue
      start="${!name}" path="${!set}" model="$(basename "${!name}")" data="$(tr A-Z a-z <<<"$set")"
      [ "$name" != SCRATCH ] || { start="" model=scratch; }
      [ "$set" != SYNTHETIC ] || path=""
      runs
    done
  done
done

report=("$venv/bin/python" -m mass_dpo_jax.report "$out" --output="$out/report")
if [ -n "$dry_run" ]; then
  printf '%q ' "${report[@]}"
  echo
  exit
fi
"${report[@]}" || failed+=("the report")
if [ "${#failed[@]}" -gt 0 ]; then
  say "${#failed[@]} failed:"
  printf '    %s\n' "${failed[@]}"
  exit 1
fi
