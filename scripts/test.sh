#!/usr/bin/env bash
# The whole test suite, in an environment of its own: ./scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
needs="-r requirements-dev.txt"
source scripts/venv.sh
.venv/bin/ruff check .
exec .venv/bin/python -m pytest -q "$@"
