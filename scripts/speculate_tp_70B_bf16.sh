#!/usr/bin/env bash
# Llama-2-70B in 16 bits on eight devices (RANKS=n), Llama-2-7B in 4 bits as the draft.
#   before it: ./scripts/prepare.sh meta-llama/Llama-2-70b-chat-hf; MODES=int4 ./scripts/prepare.sh meta-llama/Llama-2-7b-chat-hf
#   ./scripts/speculate_tp_70B_bf16.sh --prompt "Hello, my name is"      arguments go to generate.py; TINY=1 takes tiny random models
set -euo pipefail
target=meta-llama/Llama-2-70b-chat-hf/model.pth
draft=meta-llama/Llama-2-7b-chat-hf/model_int4.g32.pth
ranks=${TINY:+2}
run="-m torch.distributed.run --standalone --nproc_per_node=${RANKS:-${ranks:-8}}"
source "$(dirname "$0")/speculate.sh"
