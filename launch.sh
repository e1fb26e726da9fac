#!/usr/bin/env bash
# Presets: `bash launch.sh` lists them, `bash launch.sh NAME [extra flags…]` runs one.
#
# `bash launch.sh arguments NAME` prints the arguments of train.py that a preset stands for.
#
# The number of processes is NPROC, else the number of visible GPUs, else 1. torchrun picks a free port.
set -euo pipefail
cd "$(dirname "$0")"

# --- Presets ---------------------------------------------------------------------------------------------------------
# A data set is one row: name | arguments of train.py | kimg for NFE 2-5, for SFD-v, for the second stage | FID for NFE 2,
# 3, 4, 5 | FID of SFD-v for NFE 2-5 | FID of the second stage. Presets are NAME (2 NFE), NAME-3nfe, NAME-4nfe, NAME-5nfe,
# NAME-v (SFD-v) and NAME-1nfe (second stage; add --model_path=RUN of a 5nfe or v model).
#
# FIDs are published ones (arXiv 2409.19681, 50k images), "-" where none was published. cifar10 and cifar10-v are the
# commands of the published code, which recommends them for all EDM models. The lengths of second stages, and all
# of the latent models and of LSUN in pixels, are ours: the schedule that these models were trained with (discrete, rho 1)
# or EDM's, and a lower learning rate, for the networks are larger.

SFD="--M=3 --afs=True --sampler_tea=dpmpp --max_order=3 --predict_x0=True --lower_order_final=True"
EDM="--batch=128 --lr=5e-5 $SFD --schedule_type=polynomial --schedule_rho=7"
LATENT="--batch=128 --lr=1e-5 $SFD --schedule_type=discrete --schedule_rho=1"

families() {
  cat <<TABLE
emoji32          | --batch=16 --lr=2e-4 --dropout=0 --tick=1 --snap=5 --dump=5 $SFD --schedule_type=polynomial --schedule_rho=3 | 50 24 10 | - - - - | - | -
cifar10          | $EDM                                             | 200 800 400 | 4.53 3.58 3.24 3.06  | 4.28/3.50/3.18/2.95 | 5.83
imagenet64       | $EDM                                             | 200 800 400 | 10.25 6.35 4.99 4.33 | 9.47/5.78/4.72/4.21 | 12.89
ffhq             | $EDM                                             | 200 800 400 | - - - -              | -                   | -
afhqv2           | $EDM                                             | 200 800 400 | - - - -              | -                   | -
lsun_bedroom     | $EDM --lr=1e-5 --batch-gpu=8 --gradient_checkpointing=True | 200 800 400 | - - - -    | -                   | -
lsun_bedroom_ldm | $LATENT                                          | 200 800 400 | - - - -              | -                   | -
ffhq_ldm         | $LATENT                                          | 200 800 400 | - - - -              | -                   | -
ms_coco          | $LATENT --batch-gpu=4 --gradient_checkpointing=True | 100 400 200 | - - - -           | -                   | -
TABLE
}

# Lines of "preset | arguments | what it gives".
presets() {
  local name arguments kimg fids variable second
  local one every last
  local -a fid
  while IFS='|' read -r name arguments kimg fids variable second; do
    name=${name// /}; variable=${variable// /}; second=${second// /}
    read -r one every last <<<"$kimg"
    read -ra fid <<<"$fids"
    arguments="--dataset_name=$name $arguments"
    for nfe in 2 3 4 5; do
      echo "$name$([[ $nfe = 2 ]] || echo "-${nfe}nfe") | $arguments --total_kimg=$one --num_steps=$((nfe + 2))" \
        "--use_step_condition=False --is_second_stage=False | $nfe NFE$(published "${fid[nfe - 2]}")"
    done
    echo "$name-v | $arguments --total_kimg=$every --num_steps=4 --use_step_condition=True --is_second_stage=False" \
      "| SFD-v, NFE 2-5$(published "$variable")"
    # Later flags win: the second stage inserts 2 timestamps, and emoji32 needs no download, so it goes without LPIPS.
    echo "$name-1nfe | $arguments --total_kimg=$last --num_steps=3 --M=2 --is_second_stage=True$(
      [[ $name = emoji32 ]] && echo " --lpips=off") | 1 NFE, with --model_path=RUN$(published "$second")"
  done < <(families)
}

published() { [[ $1 = - ]] || echo ", published FID $1"; }

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

# Packages that ask for torchvision or lightning, and so for another torch, without needing them for what is used here.
# Only the command line can tell pip so.
prepare_alone() {
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps "$@"
}

TAMING=taming-transformers-rom1504==0.0.6  # the quantizer of the latent-diffusion autoencoders

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
  printf '  %-22s %s\n' quickstart "install, distil the embedded teacher for a few minutes, sample, compare" \
    test "install and run the tests (--slow: the slow ones too)"
  presets | while IFS='|' read -r name _ gives; do printf '  %-22s%s\n' "$name" "$gives"; done
}

# --- Commands --------------------------------------------------------------------------------------------------------

quickstart() {
  local out=exps/quickstart
  say "Quickstart: distil the embedded emoji teacher to 2 network evaluations per image, then compare both"
  prepare requirements-eval.txt
  # shellcheck disable=SC2046  # the arguments of a preset are words
  run train.py $(arguments_of emoji32) --total_kimg=2.5 --tick=0.5 --snap=5 --dump=1 --outdir="$out" --nosubdir "$@"
  run sample.py --model_path="$out" --seeds=0-63 --grid=True --outdir="$out"
  run sample.py --model_path="$out" --seeds=0-11 --compare=True --outdir="$out"
  run fid.py compare --model_path="$out" --seeds=0-1999 --ref=emoji32 --detector=efficientnet-lite0 --outdir="$out"
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
  [[ "${1:-}" = --slow ]] && { only=(); shift; }
  prepare tests/requirements.txt
  prepare_alone $TAMING pytorch-fid==0.3.0 torch-fidelity==0.4.0
  say "Tests"
  "$PYTHON" -m pytest -q "${only[@]}" "$@"
}

arguments_of() {
  presets | awk -F'|' -v name="$1" '{ key = $1; gsub(/ /, "", key); if (key == name) print $2 }'
}

train_preset() {
  local name=$1 arguments; shift
  arguments=$(arguments_of "$name")
  if [[ -z $arguments ]]; then
    echo "Error: there is no preset '$name'; run 'bash launch.sh' for the list" >&2
    exit 2
  fi
  prepare requirements.txt
  [[ $name != *_ldm* ]] || prepare_alone $TAMING einops
  # shellcheck disable=SC2086  # the arguments of a preset are words
  run train.py $arguments "$@"
}

case "${1:-}" in
  "" | -h | --help) list ;;
  quickstart) shift; quickstart "$@" ;;
  test) shift; run_tests "$@" ;;
  arguments) arguments_of "${2:?usage: bash launch.sh arguments NAME}" ;;
  *) train_preset "$@" ;;
esac
