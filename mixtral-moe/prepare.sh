#!/usr/bin/env bash
# Makes Mixtral ready to run: downloads 93 GB, converts them and quantizes to int8. MODES="int8 int4" quantizes to both.
# TINY=1 makes a tiny random Mixtral instead.
#   ./mixtral-moe/prepare.sh [OWNER/NAME]      or      MODEL_REPO=OWNER/NAME ./mixtral-moe/prepare.sh
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${TINY:-}" ]; then
    TINY_FAMILY=mixtral exec ./scripts/prepare.sh tiny/mixtral
fi
exec ./scripts/prepare.sh "${1:-${MODEL_REPO:-mistralai/Mixtral-8x7B-Instruct-v0.1}}"
