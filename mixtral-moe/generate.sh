#!/usr/bin/env bash
# Generates text with the Mixtral that prepare.sh made, in int8. Arguments go to generate.py.
# MODEL=model.pth takes the 16-bit weights. NPROC=n runs n processes, each with a part of every matrix: on n GPUs
# or, if there are none, on the CPU.
#   ./mixtral-moe/generate.sh --prompt "Hello, my name is"
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
repo=${MODEL_REPO:-mistralai/Mixtral-8x7B-Instruct-v0.1}
source "$root/scripts/python.sh"
launcher=
if [ "${NPROC:-1}" -gt 1 ]; then launcher="-m torch.distributed.run --standalone --nproc_per_node=$NPROC"; fi
exec "$python" $launcher "$root/generate.py" --compile --checkpoint_path "$root/checkpoints/$repo/${MODEL:-model_int8.pth}" "$@"
