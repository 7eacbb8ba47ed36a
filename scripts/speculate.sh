#!/usr/bin/env bash
# Speculation with a large model: ./scripts/speculate.sh MODEL DRAFT --prompt "Hello, my name is"
#
# MODEL and DRAFT are files in checkpoints/, such as meta-llama/Llama-2-7b-chat-hf/model_int4.g32.pth. To make this file,
# run MODES=int4 ./scripts/prepare.sh meta-llama/Llama-2-7b-chat-hf. More arguments go to generate.py. RANKS=n runs n
# processes, each on its own device. The setups of gpt-fast are also scripts: speculate_7B_int4.sh and others.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
if [ $# -lt 2 ]; then
    echo "usage: scripts/speculate.sh MODEL DRAFT [arguments of generate.py], or speculate_70B_int4.sh and the like" >&2
    exit 2
fi
model=$1 draft=$2
shift 2
source "$root/scripts/python.sh"
launcher=
if [ "${RANKS:-1}" -gt 1 ]; then launcher="-m torch.distributed.run --standalone --nproc_per_node=$RANKS"; fi
exec "$python" $launcher "$root/generate.py" --compile --speculate_k 5 --max_new_tokens 200 --temperature 0 \
    --checkpoint_path "$root/checkpoints/$model" --draft_checkpoint_path "$root/checkpoints/$draft" "$@"
