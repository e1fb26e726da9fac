#!/usr/bin/env bash
# Environment and processes for the presets of training/presets.yaml: `bash launch.sh` lists them, `bash launch.sh NAME
# [extra flags…]` runs one; with --dry-run it says what would run, and what that takes, and installs nothing.
#
# `bash launch.sh arguments NAME` prints the arguments of train.py that a preset stands for.
#
# Processes on this machine: NPROC, else the number of visible GPUs, else 1. Several machines (docs/clusters.md) run the
# same command with NNODES and RDZV_ENDPOINT=host:port of one of them, NODE_RANK=0 on that one and others elsewhere
# (where names do not tell), and an RDZV_ID of this run. MAX_RESTARTS=N lets torchrun start processes again.
set -euo pipefail
cd "$(dirname "$0")"

NNODES=${NNODES:-1} RESTARTS=${MAX_RESTARTS:-0} DRY_RUN=

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

# Sets PYTHON to that of the active environment, else of the .venv made here, else of the system.
find_python() {
  PYTHON=python3
  [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
  [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]] || PYTHON=python
}

# Installs the packages of $1, into a .venv made here if no environment is active.
prepare() {
  check_nodes
  if [[ $NNODES != 1 ]]; then  # they may share the environment, so none of them changes it
    [[ -n $DRY_RUN ]] || has_packages ||
      fail "$PYTHON lacks packages, and with NNODES nothing is installed; pip install -r $1 beforehand"
  else
    [[ $PYTHON != python3 ]] || make_environment
    install -r "$1"
  fi
}

make_environment() {
  say "Making a virtual environment in .venv"
  [[ -n $DRY_RUN ]] || python3 -m venv .venv
  PYTHON=.venv/bin/python
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

list() {
  echo "usage: bash launch.sh NAME [extra flags…]      (--dry-run says what would run; NPROC=… sets the processes)"
  echo
  presets
  cat <<'END'

quickstart installs, distils the embedded teacher, samples and compares: 7 minutes on two CPU cores. emoji32 took 112
minutes on one CPU core. FID (50k images, num_steps 4 to 7 of SFD-v in this order) and A100 hours are those of the paper
(arXiv 2409.19681), the hours of a second stage with the model that it starts from; "-": none published. 24 GB hold: so
many samples at a time (estimated, "?": close); --batch-gpu=auto finds it out and accumulates. Guidance doubles the NFE
of ms_coco. `test --slow` runs all tests.
END
}

# The list, or what a preset stands for; needs no packages.
presets() { "$PYTHON" -m training.presets "$@"; }

# --- Commands --------------------------------------------------------------------------------------------------------

quickstart() {
  local out=exps/quickstart
  [[ $NNODES = 1 ]] || fail "quickstart is for one machine; leave NNODES=$NNODES out"
  take_dry_run "$@"
  say "Quickstart: distil the embedded emoji teacher to 2 network evaluations per image, then compare both"
  prepare requirements-eval.txt
  set -- train.py --preset=quickstart --outdir="$out" --nosubdir ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
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

train_preset() {
  local name=$1; shift
  presets arguments "$name" >/dev/null
  take_dry_run "$@"
  prepare requirements.txt
  [[ $name != *_ldm* ]] || install_alone $TAMING einops
  set -- train.py --preset="$name" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
  plan "$@"
  if [[ -n $DRY_RUN ]]; then estimate "$@"; else
    exec "${COMMAND[@]}"  # so that signals reach it, and its exit code whoever started this
  fi
}

find_python
case "${1:-}" in
  "" | -h | --help) list ;;
  quickstart) shift; quickstart "$@" ;;
  test) shift; run_tests "$@" ;;
  arguments) presets arguments "${2:?usage: bash launch.sh arguments NAME}" ;;
  *) train_preset "$@" ;;
esac
