#!/usr/bin/env bash
# Makes a model from the Hugging Face hub ready to run: downloads it, converts it and quantizes it to int8.
#   ./scripts/prepare.sh OWNER/NAME      or      MODEL_REPO=OWNER/NAME ./scripts/prepare.sh
# MODES="int8 int4" quantizes to both. Weights that are already quantized in the repository stay unchanged.
# TINY_FAMILY=mixtral, or another family of tiny_model.py, makes a tiny random model in checkpoints/OWNER/NAME instead.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
repo=${1:-${MODEL_REPO:-}}
if [ -z "$repo" ] || [ $# -gt 1 ]; then
    echo "usage: scripts/prepare.sh OWNER/NAME   (a repository of the Hugging Face hub; or set MODEL_REPO)" >&2
    exit 2
fi
source scripts/python.sh
if [ -n "${TINY_FAMILY:-}" ]; then
    "$python" scripts/tiny_model.py "$TINY_FAMILY" "checkpoints/$repo"
else
    "$python" scripts/download.py --repo_id "$repo"
fi
"$python" scripts/convert_hf_checkpoint.py --checkpoint_dir "checkpoints/$repo"
if [ ! -f "checkpoints/$repo/model.pth" ] && ls "checkpoints/$repo"/model_*.pth >/dev/null 2>&1; then exit; fi
for mode in ${MODES-int8}; do
    "$python" quantize.py --checkpoint_path "checkpoints/$repo/model.pth" --mode "$mode"
done
