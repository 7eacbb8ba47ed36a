#!/usr/bin/env bash
# Mixtral, ready to run: download (93 GB), convert, quantize to int8. MODES="int8 int4" quantizes to both. TINY=1 makes a
# tiny random one instead.
#   ./mixtral-moe/prepare.sh [OWNER/NAME]      or      MODEL_REPO=OWNER/NAME ./mixtral-moe/prepare.sh
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${TINY:-}" ]; then
    exec ./scripts/prepare.sh "${1:-${MODEL_REPO:-mistralai/Mixtral-8x7B-Instruct-v0.1}}"
fi
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
$python -m tests.tiny mixtral checkpoints/tiny/mixtral
$python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/tiny/mixtral
for mode in ${MODES:-int8}; do
    $python quantize.py --checkpoint_path checkpoints/tiny/mixtral/model.pth --mode "$mode"
done
