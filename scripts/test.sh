#!/usr/bin/env bash
# Runs the whole test suite, in .venv: ./scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
needs="-r requirements-dev.txt"
source scripts/venv.sh
.venv/bin/ruff check .
export OMP_NUM_THREADS=1 # two processes share the cores; a test that needs threads asks for them
exec .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
