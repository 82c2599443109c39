#!/usr/bin/env bash
# The test suite in a virtual environment of its own: bash scripts/test.sh [--slow] [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --editable '.[dev]'
marker='not slow'
if [ "${1:-}" = --slow ]; then marker=slow; shift; fi
# One thread a worker: two multi-threaded jobs side by side run many times slower than one. A file stays on one worker, with what it sets up.
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -n 2 --dist loadfile -m "$marker" "$@"
