#!/usr/bin/env bash
# Presets: `bash launch.sh` lists them, `bash launch.sh NAME [extra flags…]` runs one; with --dry-run it says what would
# run, and what that takes, and installs nothing.
#
# `bash launch.sh arguments NAME` prints the arguments of train.py that a preset stands for.
#
# Processes on this machine: NPROC, else the number of visible GPUs, else 1. Several machines (docs/clusters.md) run the
# same command with NNODES and RDZV_ENDPOINT=host:port of one of them, NODE_RANK=0 on that one and others elsewhere
# (where names do not tell), and an RDZV_ID of this run. MAX_RESTARTS=N lets torchrun start processes again.
set -euo pipefail
cd "$(dirname "$0")"

NNODES=${NNODES:-1} RESTARTS=${MAX_RESTARTS:-0} DRY_RUN=

# --- Presets ---------------------------------------------------------------------------------------------------------
# A data set is one row: name | arguments of train.py | kimg for NFE 2-5, for SFD-v, for the second stage | FID for NFE 2,
# 3, 4, 5 | FID of SFD-v for NFE 2-5 | FID of the second stage | A100 hours for NFE 2, 3, 4, 5, for SFD-v, for the second
# stage and what it starts from | samples at a time that 24 GB hold. Presets are NAME (2 NFE), NAME-3nfe, NAME-4nfe,
# NAME-5nfe, NAME-v (SFD-v) and NAME-1nfe (second stage; add --model_path=RUN of a 5nfe or v model).
#
# FIDs and hours are published ones (arXiv 2409.19681, 50k images), "-" where none was published. cifar10 and cifar10-v
# are the commands of the published code, which recommends them for all EDM models. The lengths of second stages, and all
# of the latent models and of LSUN in pixels, are ours: the schedule that these models were trained with (discrete, rho 1)
# or EDM's, and a lower learning rate, for the networks are larger. The samples that 24 GB hold are estimated
# (training/cost.py, fp16), with room for what is not counted; "?" for ms_coco, of which weights, gradients and moments
# alone take 19 GiB, and text encoder and first stage come on top.

SFD="--M=3 --afs=True --sampler_tea=dpmpp --max_order=3 --predict_x0=True --lower_order_final=True"
# One GPU takes every preset: what does not fit at once is accumulated.
EDM="--batch=128 --batch-gpu=auto --lr=5e-5 $SFD --schedule_type=polynomial --schedule_rho=7"
LATENT="--batch=128 --batch-gpu=auto --lr=1e-5 $SFD --schedule_type=discrete --schedule_rho=1"

families() {
  cat <<TABLE
emoji32          | --batch=16 --lr=4e-4 --lr_schedule=linear --dropout=0 --tick=1 --snap=5 --dump=5 $SFD --denoise_to_zero=True --schedule_type=polynomial --schedule_rho=3 | 100 24 10 | - - - - | - | - | - - - - - - | all
cifar10          | $EDM                                             | 200 800 400 | 4.53 3.58 3.24 3.06  | 4.28/3.50/3.18/2.95 | 5.83 | 0.64 0.92 1.17 1.42 4.26 4.88 | 64
imagenet64       | $EDM                                             | 200 800 400 | 10.25 6.35 4.99 4.33 | 9.47/5.78/4.72/4.21 | 12.89 | - - - - - - | 8
ffhq             | $EDM                                             | 200 800 400 | - - - -              | -                   | - | - - - - - - | 64
afhqv2           | $EDM                                             | 200 800 400 | - - - -              | -                   | - | - - - - - - | 64
lsun_bedroom     | $EDM --lr=1e-5 --gradient_checkpointing=True     | 200 800 400 | - - - -              | -                   | - | - - - - - - | 4
lsun_bedroom_ldm | $LATENT                                          | 200 800 400 | - - - -              | -                   | - | - - - - - - | 8
ffhq_ldm         | $LATENT                                          | 200 800 400 | - - - -              | -                   | - | - - - - - - | 8
ms_coco          | $LATENT --gradient_checkpointing=True            | 100 400 200 | - - - -              | -                   | - | - - - - - - | ?
TABLE
}

# Lines of "preset | arguments | what it gives | FID | A100 hours | samples that 24 GB hold".
presets() {
  local name arguments kimg fids variable second costs held
  local one every last nfe suffix
  local -a fid hours
  while IFS='|' read -r name arguments kimg fids variable second costs held; do
    name=${name// /} variable=${variable// /} second=${second// /} held=${held// /}
    read -r one every last <<<"$kimg"
    read -ra fid <<<"$fids"
    read -ra hours <<<"$costs"
    arguments="--dataset_name=$name $arguments"
    for nfe in 2 3 4 5; do
      suffix=$([[ $nfe = 2 ]] || echo "-${nfe}nfe")
      echo "$name$suffix | $arguments --total_kimg=$one --num_steps=$((nfe + 2)) --use_step_condition=False" \
        "--is_second_stage=False | NFE $nfe | ${fid[nfe - 2]} | ${hours[nfe - 2]} | $held"
    done
    echo "$name-v | $arguments --total_kimg=$every --num_steps=4 --use_step_condition=True --is_second_stage=False" \
      "| NFE 2-5 (SFD-v) | $variable | ${hours[4]} | $held"
    # Later flags win: the second stage inserts 2 timestamps, and its teacher ends without noise already; emoji32 needs no
    # download, so it goes without LPIPS.
    echo "$name-1nfe | $arguments --total_kimg=$last --num_steps=3 --M=2 --is_second_stage=True --denoise_to_zero=False$(
      [[ $name = emoji32 ]] && echo " --lpips=off") | NFE 1, --model_path=RUN | $second | ${hours[5]} | $held"
  done < <(families)
}

# --- Helpers ---------------------------------------------------------------------------------------------------------

say() { [[ ${NODE_RANK:-0} != 0 ]] || printf '\n== %s\n' "$*"; }

fail() {
  echo "Error: $*" >&2
  exit 2
}

# Sets ARGUMENTS to the arguments without --dry-run, and DRY_RUN where it is one of them. An empty array is used as
# ${A[@]+"${A[@]}"}, for it counts as unset in the bash 3.2 of macOS.
take_dry_run() {
  local argument
  ARGUMENTS=()
  for argument; do
    case $argument in -n | --dry-run) DRY_RUN=yes ;; *) ARGUMENTS+=("$argument") ;; esac
  done
}

check_nodes() {
  [[ $NNODES =~ ^[1-9][0-9]*$ ]] || fail "NNODES is '$NNODES'; expected the number of machines"
  [[ $RESTARTS =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS is '$RESTARTS'; expected a number"
  [[ ${NODE_RANK:-0} =~ ^[0-9]+$ ]] || fail "NODE_RANK is '$NODE_RANK'; expected 0 to $((NNODES - 1))"
  [[ $NNODES = 1 || -n ${RDZV_ENDPOINT:-} ]] ||
    fail "NNODES=$NNODES needs RDZV_ENDPOINT=host:port of one of the machines, the same on all of them"
}

# Sets PYTHON to that of the active environment, else of a .venv made here, with the packages of $1 installed.
prepare() {
  check_nodes
  PYTHON=.venv/bin/python
  [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]] || PYTHON=python
  if [[ $NNODES != 1 ]]; then  # they may share the environment, so none of them changes it
    [[ -n $DRY_RUN ]] || has_packages ||
      fail "$PYTHON lacks packages, and with NNODES nothing is installed; pip install -r $1 beforehand"
  else
    [[ $PYTHON = python || -x $PYTHON ]] || make_environment
    install -r "$1"
  fi
}

make_environment() {
  say "Making a virtual environment in .venv"
  [[ -n $DRY_RUN ]] || python3 -m venv .venv
}

install() {
  say "$PYTHON -m pip install $*"
  [[ -n $DRY_RUN ]] || "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"
}

# Packages that ask for torchvision or lightning, and so for another torch, without needing them for what is used here.
# Only the command line can tell pip so.
install_alone() { [[ $NNODES != 1 ]] || install --no-deps "$@"; }

TAMING=taming-transformers-rom1504==0.0.6  # the quantizer of the latent-diffusion autoencoders

has_packages() {
  "$PYTHON" -c 'from importlib.util import find_spec as f; exit(not (f("torch") and f("click")))' >/dev/null 2>&1
}

processes() {
  if [[ -n "${NPROC:-}" ]]; then echo "$NPROC"; elif has_packages; then
    "$PYTHON" -c 'import torch; print(max(torch.cuda.device_count(), 1))'
  else echo 1; fi
}

# Sets COMMAND to what runs a script of ours, under torchrun where there are several processes, and says it.
plan() {
  local count line
  count=$(processes)
  [[ $count =~ ^[1-9][0-9]*$ ]] || fail "NPROC is '$count'; expected the number of processes"
  WORLD=$((NNODES * count))
  COMMAND=("$PYTHON")
  if [[ $NNODES != 1 ]]; then
    COMMAND+=(-m torch.distributed.run --nnodes="$NNODES" --nproc_per_node="$count" --rdzv-backend=c10d
      --rdzv-endpoint="$RDZV_ENDPOINT" --rdzv-id="${RDZV_ID:-sfd}" --max-restarts="$RESTARTS")
    # Without a rank, the machine that has the name of the endpoint holds the store.
    [[ -z ${NODE_RANK:-} ]] || COMMAND+=(--rdzv-conf="is_host=$([[ $NODE_RANK = 0 ]] && echo 1 || echo 0)")
  elif [[ $count != 1 || $RESTARTS != 0 ]]; then
    COMMAND+=(-m torch.distributed.run --standalone --nproc_per_node="$count")
    [[ $RESTARTS = 0 ]] || COMMAND+=(--max-restarts="$RESTARTS")
  fi
  # Else torchrun's parser takes --log and --num for its own options, cut short.
  ((${#COMMAND[@]} == 1)) || COMMAND+=(--)
  COMMAND+=("$@")
  line=$(printf '%q ' "${COMMAND[@]}")
  say "${line% }"
}

run() {
  plan "$@"
  [[ -n $DRY_RUN ]] || "${COMMAND[@]}"
}

# What a run of train.py takes; one process tells for all of them.
estimate() {
  if has_packages; then WORLD_SIZE=$WORLD "$PYTHON" "$@" --dry-run; else
    say "What it takes can be told once the packages above are installed"
  fi
}

row() { printf '  %-21s  %-25s  %-19s  %-10s  %s\n' "$@"; }

list() {
  echo "usage: bash launch.sh NAME [extra flags…]      (--dry-run says what would run; NPROC=… sets the processes)"
  echo
  row preset gives "FID" "A100 hours" "24 GB hold"
  row quickstart "NFE 2, in minutes" - - all
  presets | while IFS='|' read -r name _ gives fid hours held; do
    row "${name// /}" "$(trim "$gives")" "${fid// /}" "${hours// /}" "${held// /}"
  done
  row test "runs the tests" - - -
  cat <<'END'

quickstart installs, distils the embedded teacher, samples and compares: 7 minutes on two CPU cores. emoji32 took 112
minutes on one CPU core. FID (50k images, num_steps 4 to 7 of SFD-v in this order) and A100 hours are those of the paper
(arXiv 2409.19681), the hours of a second stage with the model that it starts from; "-": none published. 24 GB hold: so
many samples at a time (estimated, "?": close); --batch-gpu=auto finds it out and accumulates. Guidance doubles the NFE
of ms_coco. `test --slow` runs all tests.
END
}

trim() {
  local text
  read -r text <<<"$1"
  echo "$text"
}

# --- Commands --------------------------------------------------------------------------------------------------------

quickstart() {
  local out=exps/quickstart
  [[ $NNODES = 1 ]] || fail "quickstart is for one machine; leave NNODES=$NNODES out"
  take_dry_run "$@"
  say "Quickstart: distil the embedded emoji teacher to 2 network evaluations per image, then compare both"
  prepare requirements-eval.txt
  # shellcheck disable=SC2046  # the arguments of a preset are words
  set -- train.py $(arguments_of emoji32) --total_kimg=2.5 --tick=0.5 --snap=5 --dump=1 --outdir="$out" --nosubdir \
    ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
  run "$@"
  [[ -z $DRY_RUN ]] || estimate "$@"
  run sample.py --model_path="$out" --seeds=0-63 --grid=True --outdir="$out"
  run sample.py --model_path="$out" --seeds=0-11 --compare=True --outdir="$out"
  run fid.py compare --model_path="$out" --seeds=0-1999 --ref=emoji32 --detector=efficientnet-lite0 --outdir="$out"
  [[ -z $DRY_RUN ]] || return 0
  say "Done. Look at:"
  echo "  $out/grid.png       64 images of the student, 2 network evaluations each"
  echo "  $out/compare.png    the same seeds by the teacher and by training-free solvers"
  echo "  $out/compare.md     how far each is from the teacher's 35-evaluation image"
  echo "  $out/metrics.png    Fréchet distance, precision, recall, density and coverage of all of them, 2,000 images each"
  echo "  $out/metrics.md     the same as a table"
  echo "  $out/stats.jsonl    the loss of each step, along the run"
}

run_tests() {
  local only=(-m "not slow")
  while :; do
    case "${1:-}" in --slow) only=() ;; --dry-run) DRY_RUN=yes ;; *) break ;; esac
    shift
  done
  [[ $NNODES = 1 ]] || fail "the tests are for one machine; leave NNODES=$NNODES out"
  prepare tests/requirements.txt
  install_alone $TAMING pytorch-fid==0.3.0 torch-fidelity==0.4.0
  set -- "$PYTHON" -m pytest -q ${only[@]+"${only[@]}"} "$@"
  say "$*"
  [[ -n $DRY_RUN ]] || "$@"
}

arguments_of() {
  presets | awk -F'|' -v name="$1" '{ key = $1; gsub(/ /, "", key); if (key == name) print $2 }'
}

train_preset() {
  local name=$1 arguments; shift
  arguments=$(arguments_of "$name")
  [[ -n $arguments ]] || fail "there is no preset '$name'; run 'bash launch.sh' for the list"
  take_dry_run "$@"
  prepare requirements.txt
  [[ $name != *_ldm* ]] || install_alone $TAMING einops
  # shellcheck disable=SC2086  # the arguments of a preset are words
  set -- train.py $arguments ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
  plan "$@"
  if [[ -n $DRY_RUN ]]; then estimate "$@"; else
    exec "${COMMAND[@]}"  # so that signals reach it, and its exit code whoever started this
  fi
}

case "${1:-}" in
  "" | -h | --help) list ;;
  quickstart) shift; quickstart "$@" ;;
  test) shift; run_tests "$@" ;;
  arguments) arguments_of "${2:?usage: bash launch.sh arguments NAME}" ;;
  *) train_preset "$@" ;;
esac
