#!/usr/bin/env bash
# Presets: `bash launch.sh` lists them, `bash launch.sh NAME [extra flags…]` runs one.
#
# The number of processes is NPROC, else the number of visible GPUs, else 1. torchrun picks a free port.
set -euo pipefail
cd "$(dirname "$0")"

# --- Presets: name | arguments of train.py | what it gives -----------------------------------------------------------
# Published numbers (FID on 50k images; A100 hours) are those of arXiv 2409.19681; the others were measured with this
# program, see README.md.

SFD="--num_steps=4 --M=3 --afs=True --sampler_tea=dpmpp --max_order=3 --predict_x0=True --lower_order_final=True \
--schedule_type=polynomial --schedule_rho=7 --is_second_stage=False"
EDM="--batch=128 --lr=5e-5 $SFD"
EMOJI="--dataset_name=emoji32 --batch=64 --lr=3e-4 --dropout=0 $SFD"

presets() {
  cat <<TABLE
emoji32      | $EMOJI --total_kimg=20 --use_step_condition=False --tick=1 --snap=5 --dump=5 | 2 NFE on the embedded teacher; no download
emoji32-v    | $EMOJI --total_kimg=40 --use_step_condition=True --tick=2 --snap=4 --dump=1   | SFD-v on the embedded teacher, NFE 2-5
cifar10      | --dataset_name=cifar10 --total_kimg=200 $EDM --use_step_condition=False    | 2 NFE, published FID 4.53 (0.64 A100 hours)
cifar10-v    | --dataset_name=cifar10 --total_kimg=800 $EDM --use_step_condition=True     | SFD-v, published FID 4.28 / 3.50 / 3.18 / 2.95 at NFE 2 / 3 / 4 / 5 (4.26 A100 hours)
imagenet64   | --dataset_name=imagenet64 --total_kimg=200 $EDM --use_step_condition=False | 2 NFE, published FID 10.25
imagenet64-v | --dataset_name=imagenet64 --total_kimg=800 $EDM --use_step_condition=True  | SFD-v, published FID 9.47 / 5.78 / 4.72 / 4.21 at NFE 2 / 3 / 4 / 5
ffhq         | --dataset_name=ffhq --total_kimg=200 $EDM --use_step_condition=False       | 2 NFE
ffhq-v       | --dataset_name=ffhq --total_kimg=800 $EDM --use_step_condition=True        | SFD-v, NFE 2-5
afhqv2       | --dataset_name=afhqv2 --total_kimg=200 $EDM --use_step_condition=False     | 2 NFE
afhqv2-v     | --dataset_name=afhqv2 --total_kimg=800 $EDM --use_step_condition=True      | SFD-v, NFE 2-5
TABLE
}

# --- Helpers ---------------------------------------------------------------------------------------------------------

say() { printf '\n== %s\n' "$*"; }

# Sets PYTHON to that of the active environment, else of a .venv made here, with the packages of $1 installed.
prepare() {
  if [[ -n "${VIRTUAL_ENV:-}" || -n "${CONDA_PREFIX:-}" ]]; then
    PYTHON=python
  else
    PYTHON=.venv/bin/python
    [[ -x $PYTHON ]] || { say "Making a virtual environment in .venv"; python3 -m venv .venv; }
  fi
  say "Installing what $1 lists into the environment of $("$PYTHON" -c 'import sys; print(sys.prefix)')"
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$1"
}

processes() {
  if [[ -n "${NPROC:-}" ]]; then echo "$NPROC"; else
    "$PYTHON" -c 'import torch; print(max(torch.cuda.device_count(), 1))'
  fi
}

# Runs a script of ours, under torchrun where there are several processes.
run() {
  local count; count=$(processes)
  say "python $* ($count process$([[ $count = 1 ]] || echo es))"
  if [[ $count = 1 ]]; then "$PYTHON" "$@"; else
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$count" "$@"
  fi
}

list() {
  echo "usage: bash launch.sh NAME [extra flags…]      (NPROC=… sets the number of processes)"
  echo
  printf '  %-13s %s\n' quickstart "install, distil the embedded teacher for a few minutes, sample, compare" \
    test "install and run the tests (--slow: the slow ones too)"
  presets | while IFS='|' read -r name _ gives; do printf '  %-13s%s\n' "$name" "$gives"; done
}

# --- Commands --------------------------------------------------------------------------------------------------------

quickstart() {
  local out=exps/quickstart
  say "Quickstart: distil the embedded emoji teacher to 2 network evaluations per image, then compare both"
  prepare requirements.txt
  run train.py $EMOJI --total_kimg=4 --tick=0.5 --snap=4 --dump=2 --outdir="$out" --nosubdir "$@"
  run sample.py --model_path="$out" --seeds=0-63 --grid=True --outdir="$out"
  run sample.py --model_path="$out" --seeds=0-11 --compare=True --outdir="$out"
  say "Done. Look at:"
  echo "  $out/grid.png       64 images of the student, 2 network evaluations each"
  echo "  $out/compare.png    the same seeds by the teacher and by training-free solvers"
  echo "  $out/compare.md     how far each is from the teacher's 35-evaluation image"
  echo "  $out/stats.jsonl    the loss of each step, along the run"
}

run_tests() {
  local only=(-m "not slow")
  [[ "${1:-}" = --slow ]] && { only=(); shift; }
  prepare tests/requirements.txt
  say "Tests"
  "$PYTHON" -m pytest -q "${only[@]}" "$@"
}

train_preset() {
  local name=$1 arguments; shift
  arguments=$(presets | awk -F'|' -v name="$name" '{ key = $1; gsub(/ /, "", key); if (key == name) print $2 }')
  if [[ -z $arguments ]]; then
    echo "Error: there is no preset '$name'; run 'bash launch.sh' for the list" >&2
    exit 2
  fi
  prepare requirements.txt
  # shellcheck disable=SC2086  # the arguments of a preset are words
  run train.py $arguments "$@"
}

case "${1:-}" in
  "" | -h | --help) list ;;
  quickstart) shift; quickstart "$@" ;;
  test) shift; run_tests "$@" ;;
  *) train_preset "$@" ;;
esac
