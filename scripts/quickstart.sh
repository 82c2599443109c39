#!/usr/bin/env bash
# From a bare checkout to pictures: install, distil a shipped teacher with DMD2, export, evaluate, report.
# Usage: bash scripts/quickstart.sh [run folder] [recipe]. The recipe is emoji/quickstart (text to image) unless it is named;
# fashion/quickstart is the other one (classes to garments). An interrupted run goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv} run=${1:-runs/quickstart} recipe=${2:-emoji/quickstart}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --editable '.[emoji]'
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}       # accelerate would pin one thread on a CPU
if [ -f "$run/recipe.yaml" ]; then what=(--resume "$run"); else what=(--config "$recipe" --out "$run"); fi
"$venv/bin/accelerate" launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no scripts/train_dmd.py "${what[@]}"
"$venv/bin/python" scripts/quickstart_report.py "$run"
