#!/usr/bin/env bash
# generate.sh on several GPUs (or, for a look at how it works, processes on a CPU), each with its part of every matrix.
#   NPROC=4 ./mixtral-moe/tp.sh --prompt "Hello, my name is"
set -euo pipefail
cd "$(dirname "$0")/.."
repo=${MODEL_REPO:-mistralai/Mixtral-8x7B-Instruct-v0.1}
if [ -n "${TINY:-}" ]; then repo=tiny/mixtral; fi
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
exec $python -m torch.distributed.run --standalone --nproc_per_node="${NPROC:-2}" \
    generate.py --compile --checkpoint_path "checkpoints/$repo/${MODEL:-model_int8.pth}" "$@"
