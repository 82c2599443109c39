#!/usr/bin/env bash
# The long recipe of the fashion world: DMD2, then its polish (one step), then three calls more (four steps); export and 10,000 pictures of each.
# Trains for 1 h 45 min on 2 free cores. Usage: bash scripts/long.sh [folder], after `pip install -e .`. An interrupted run goes on where it stopped. docs/long holds what it made.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/long}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
train() {                                                 # NAME RECIPE [key=value ...]
  if [ -f "$out/$1/recipe.yaml" ]; then stepdistill train --resume "$out/$1"; else stepdistill train --config "$2" --out "$out/$1" "${@:3}"; fi
}
score() {                                                 # NAME RUN STEPS
  [ -d "$out/$1" ] || stepdistill export "$out/$2" --to "$out/$1"
  [ -f "$out/$1.json" ] || stepdistill eval "$out/$1" --protocol fashion --count 10000 --steps "$3" --to "$out/$1.json"
}
train dmd2 fashion/dmd2
train polish fashion/polish start="$out/dmd2"
train polish_4step fashion/polish_4step start="$out/dmd2"
score one_step polish 1
score four_steps polish_4step 4
stepdistill compare docs/long/teacher*.json "$out/one_step.json" "$out/four_steps.json" --to "$out/report"
