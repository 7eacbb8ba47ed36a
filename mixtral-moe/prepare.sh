#!/usr/bin/env bash
# Mixtral, ready to run: download (about 93 GB), convert, quantize to int8. TINY=1 makes a tiny random one instead.
#   ./mixtral-moe/prepare.sh [OWNER/NAME]
set -euo pipefail
cd "$(dirname "$0")/.."
repo=${1:-mistralai/Mixtral-8x7B-Instruct-v0.1}
[ -z "${TINY:-}" ] || repo=tiny/mixtral
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
if [ -n "${TINY:-}" ]; then
    $python -m tests.tiny mixtral checkpoints/$repo
    $python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/$repo
    exec $python quantize.py --checkpoint_path checkpoints/$repo/model.pth --mode int8
fi
exec ./scripts/prepare.sh "$repo"
