#!/usr/bin/env bash
# Environment and processes for the presets of training/presets.yaml: `bash launch.sh` lists them, `bash launch.sh NAME
# [extra flags…]` runs one; with --dry-run it says what would run, and what that takes, and installs nothing.
#
# `bash launch.sh arguments NAME` prints the arguments of train.py that a preset stands for.
#
# Processes on this machine: NPROC, else the number of visible GPUs, else 1. Several machines (docs/clusters.md) run the
# same command with NNODES and RDZV_ENDPOINT=host:port of one of them, NODE_RANK=0 on that one and others elsewhere
# (where names do not tell), and an RDZV_ID of this run. MAX_RESTARTS=N lets torchrun start processes again.
#
# SFD_NO_INSTALL=1 installs nothing. Linux, macOS (bash 3.2), and WSL on Windows.
set -euo pipefail
cd "$(dirname "$0")"

NNODES=${NNODES:-1} RESTARTS=${MAX_RESTARTS:-0} DRY_RUN='' NO_INSTALL=${SFD_NO_INSTALL:+SFD_NO_INSTALL}
# Several machines may share the environment, so none of them changes it.
[[ $NNODES = 1 ]] || NO_INSTALL=NNODES

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

# Everything that is a number, before anything is installed.
check_numbers() {
  [[ ${NPROC:-1} =~ ^[1-9][0-9]*$ ]] || fail "NPROC is '$NPROC'; expected the number of processes"
  [[ $NNODES =~ ^[1-9][0-9]*$ ]] || fail "NNODES is '$NNODES'; expected the number of machines"
  [[ $RESTARTS =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS is '$RESTARTS'; expected a number"
  [[ ${NODE_RANK:-0} =~ ^[0-9]+$ ]] || fail "NODE_RANK is '$NODE_RANK'; expected 0 to $((NNODES - 1))"
  [[ $NNODES = 1 || -n ${RDZV_ENDPOINT:-} ]] ||
    fail "NNODES=$NNODES needs RDZV_ENDPOINT=host:port of one of the machines, the same on all of them"
}

# Sets PYTHON to that of the active environment, else of the .venv made here, else of the system (OUTSIDE).
find_python() {
  local candidate
  PYTHON='' OUTSIDE=''
  if [[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then PYTHON=python; elif [[ -x .venv/bin/python ]]; then
    PYTHON=.venv/bin/python
  else
    OUTSIDE=yes
    for candidate in python3 python python3.13 python3.12 python3.11 python3.10; do
      ! is_recent "$candidate" || { PYTHON=$candidate; break; }
    done
  fi
  [[ -n $PYTHON ]] && is_recent "$PYTHON" || fail "${PYTHON:-python3} is no Python 3.10 or newer (3.11 is tested);" \
    "install one, or activate an environment that has it"
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

# Installs what is missing of requirements file $1, and of the packages $2…, which are taken without their dependencies:
# they ask for torchvision or lightning, and so for another torch, without needing them for what is used here.
#
# A torch that is there is never changed. What is not in an environment, as a module, a container or a system has it, is
# used as it is; packages that it lacks go to a .venv that sees it.
prepare() {
  local file=$1; shift
  check_numbers
  if [[ -n $OUTSIDE && -z $NO_INSTALL ]] && ! has "$file" "$@"; then make_environment; fi
  find_missing "$file" "$@"
  ((${#MISSING[@]} != 0)) || return 0
  [[ -z $NO_INSTALL ]] ||
    fail "$PYTHON lacks ${MISSING[*]}, and nothing is installed with $NO_INSTALL; install that beforehand"
  [[ ${ASK[0]} != "$PYTHON" ]] || "$PYTHON" -m pip --version >/dev/null 2>&1 ||
    fail "$PYTHON has no pip to install ${MISSING[*]}; do so with the tool that made this environment" \
      "(uv pip install …), or run: $PYTHON -m ensurepip"
  find_missing "$file"
  install_missing
  find_missing "$@"
  ((${#MISSING[@]} == 0)) || install --no-deps "${MISSING[@]}"
  find_missing "$file" "$@"
}

# Sets MISSING to the requirements, of files and words, that are not met.
find_missing() {
  local line lines
  MISSING=()
  (($# != 0)) || return 0
  lines=$("${ASK[@]}" dnnlib/packages.py "$@") || exit 2
  while IFS= read -r line; do [[ -z $line ]] || MISSING+=("$line"); done <<<"$lines"
}

has() { local lines; lines=$("$PYTHON" dnnlib/packages.py "$@" 2>/dev/null) && [[ -z $lines ]]; }

make_environment() {
  local options='' lines
  if lines=$("$PYTHON" dnnlib/packages.py requirements.txt 2>/dev/null) && ! grep -q '^torch' <<<"$lines"; then
    options=--system-site-packages
  fi
  say "$PYTHON -m venv ${options:+$options }.venv"
  if [[ -n $DRY_RUN ]]; then  # so that what would be missing in it is known
    [[ -z $options ]] && ASK=("$PYTHON" -S) || ASK=("$PYTHON")
  else
    # shellcheck disable=SC2086  # no option is no word
    "$PYTHON" -m venv $options .venv >/dev/null || {
      rm -rf .venv
      fail "$PYTHON cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"
    }
    ASK=(.venv/bin/python)
  fi
  PYTHON=.venv/bin/python
}

# Installs MISSING. A torch that is missing comes in the release that is tested, without a GPU as the CPU build, which
# saves gigabytes; a torch that is there is asked for as it is, so that pip ends rather than replaces it.
install_missing() {
  local torch
  ((${#MISSING[@]} != 0)) || return 0
  if [[ ${MISSING[*]} = *torch[=\>]* ]]; then
    if is_cpu_machine; then
      install --timeout 15 --retries 0 --index-url "$CPU_BUILDS" -c tests/constraints.txt torch 2>/dev/null ||
        say "$CPU_BUILDS is not reached; the usual index may have a larger build"
    fi
    install -c tests/constraints.txt "${MISSING[@]}"
  else
    torch=$("${ASK[@]}" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' 2>/dev/null) || true
    install "${MISSING[@]}" ${torch:+"$torch"}
  fi
}

install() {
  local line
  line=$(printf '%q ' "$@")
  say "$PYTHON -m pip install ${line% }"
  [[ -n $DRY_RUN ]] || "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"
}

CPU_BUILDS=https://download.pytorch.org/whl/cpu
TAMING=taming-transformers-rom1504==0.0.6  # the quantizer of the latent-diffusion autoencoders

# Linux without a GPU of NVIDIA; torch of the usual index brings its libraries along there.
is_cpu_machine() { [[ $(uname) = Linux && ! -e /dev/nvidiactl ]] && ! nvidia-smi -L >/dev/null 2>&1; }

processes() {
  if [[ -n "${NPROC:-}" ]]; then echo "$NPROC"; elif ((${#MISSING[@]} == 0)); then
    "$PYTHON" -c 'import torch; print(max(torch.cuda.device_count(), 1))' 2>/dev/null ||
      fail "the torch of $PYTHON cannot be imported; see why: $PYTHON -c 'import torch'"
  else echo 1; fi
}

# Sets COMMAND to what runs a script of ours, under torchrun where there are several processes, and says it.
plan() {
  local count line
  count=$(processes)
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
  if ((${#MISSING[@]} == 0)); then WORLD_SIZE=$WORLD "$PYTHON" "$@" --dry-run; else
    say "What it takes can be told once the packages above are installed"
  fi
}

list() {
  echo "usage: bash launch.sh NAME [extra flags…]      (--dry-run says what would run; NPROC=… sets the processes)"
  echo
  presets
  cat <<'END'

quickstart installs, distils the embedded teacher, samples and compares: 7 minutes on two CPU cores with bfloat16.
emoji32 took 28 minutes on one such core, and 81 on one without. FID (50k images, num_steps 4 to 7 of SFD-v in this
order) and A100 hours are those of the paper (arXiv 2409.19681), the hours of a second stage with the model that it
starts from; "-": none published. 24 GB hold: so many samples at a time (estimated); --batch-gpu=auto finds it out and
accumulates. Guidance doubles the NFE of ms_coco. `test --slow` runs all tests; `gpu-check` says in ten minutes what is
right on a GPU, and what it takes.
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
  say "First the student that ships: 64 images, 2 network evaluations each"
  run sample.py --model_path=assets/emoji32-student.safetensors --seeds=0-63 --grid=True --outdir="$out/shipped"
  say "Now one of your own, in an eighth of its training"
  set -- train.py --preset=quickstart --outdir="$out" --nosubdir ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
  run "$@"
  [[ -z $DRY_RUN ]] || estimate "$@"
  run sample.py --model_path="$out" --seeds=0-63 --grid=True --outdir="$out"
  run sample.py --model_path="$out" --seeds=0-11 --compare=True --outdir="$out"
  run fid.py compare --model_path="$out" --seeds=0-1999 --ref=emoji32 --detector=efficientnet-lite0 --outdir="$out"
  [[ -z $DRY_RUN ]] || return 0
  say "Done. Look at:"
  echo "  $out/shipped/grid.png  64 images of the student that ships with this program"
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
  prepare tests/requirements.txt $TAMING pytorch-fid==0.3.0 torch-fidelity==0.4.0 diffusers==0.42.1 importlib_metadata zipp
  set -- "$PYTHON" -m pytest -q ${only[@]+"${only[@]}"} "$@"
  say "$*"
  [[ -n $DRY_RUN ]] || "$@"
}

gpu_check() {
  take_dry_run "$@"
  prepare requirements.txt
  set -- "$PYTHON" tests/gpu_check.py ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
  say "$*"
  [[ -n $DRY_RUN ]] || "$@"
}

train_preset() {
  local name=$1; shift
  presets arguments "$name" >/dev/null
  take_dry_run "$@"
  if [[ $name = *_ldm* ]]; then prepare requirements.txt $TAMING einops; else prepare requirements.txt; fi
  set -- train.py --preset="$name" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
  plan "$@"
  if [[ -n $DRY_RUN ]]; then estimate "$@"; else
    exec "${COMMAND[@]}"  # so that signals reach it, and its exit code whoever started this
  fi
}

find_python
ASK=("$PYTHON")  # what is asked for packages
case "${1:-}" in
  "" | -h | --help) list ;;
  quickstart) shift; quickstart "$@" ;;
  test) shift; run_tests "$@" ;;
  gpu-check) shift; gpu_check "$@" ;;
  arguments) presets arguments "${2:?usage: bash launch.sh arguments NAME}" ;;
  *) train_preset "$@" ;;
esac
