#!/usr/bin/env bash
# Makes Mixtral ready to run: downloads 93 GB, converts them and quantizes to int8. MODES="int8 int4" quantizes to both.
#   ./mixtral-moe/prepare.sh [OWNER/NAME]      or      MODEL_REPO=OWNER/NAME ./mixtral-moe/prepare.sh
set -euo pipefail
exec "$(dirname "$0")/../scripts/prepare.sh" "${1:-${MODEL_REPO:-mistralai/Mixtral-8x7B-Instruct-v0.1}}"
