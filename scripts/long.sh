#!/usr/bin/env bash
# The long recipe of the fashion world: DMD2, then its polish (one step), then three calls more (four steps); export, 10,000 pictures of each
# and of the teacher, and the report. Usage: bash scripts/long.sh [folder], after `pip install -e .`. An interrupted run goes on where it
# stopped. On 2 free cores the students take an hour and a half, the teacher's pictures another hour. docs/long holds what it made.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/long}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
train() {                                                 # NAME RECIPE [key=value ...]
  if [ -f "$out/$1/recipe.yaml" ]; then stepdistill train --resume "$out/$1"; else stepdistill train --config "$2" --out "$out/$1" "${@:3}"; fi
}
score() {                                                 # NAME MODEL [option ...]
  [ -f "$out/$1.json" ] || stepdistill eval "$2" --protocol fashion --count 10000 --to "$out/$1.json" "${@:3}"
}
student() {                                               # NAME RUN STEPS
  [ -d "$out/$1" ] || stepdistill export "$out/$2" --to "$out/$1"
  score "$1" "$out/$1" --steps "$3"
}
train dmd2 fashion/dmd2
train polish fashion/polish start="$out/dmd2"
train polish_4step fashion/polish_4step start="$out/dmd2"
student one_step polish 1
student four_steps polish_4step 4
score teacher teacher:fashion --steps 25 --guidance 1.25 --solver ddim --renoise 0.3 --shift 0.5
for steps in 4 2 1; do score "teacher_ddim_$steps" teacher:fashion --steps "$steps" --guidance 1.5 --solver ddim; done
stepdistill compare "$out"/teacher*.json "$out/one_step.json" "$out/four_steps.json" --to "$out/report" \
  --run "$out/dmd2" --run "$out/polish" --run "$out/polish_4step"
