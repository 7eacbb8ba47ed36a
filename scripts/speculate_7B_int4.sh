#!/usr/bin/env bash
# Llama-2-7B in 16 bits, its own 4-bit file as the draft.
#   before it: MODES=int4 ./scripts/prepare.sh meta-llama/Llama-2-7b-chat-hf
#   ./scripts/speculate_7B_int4.sh --prompt "Hello, my name is"      arguments go to generate.py; TINY=1 takes tiny random models
set -euo pipefail
target=meta-llama/Llama-2-7b-chat-hf/model.pth
draft=meta-llama/Llama-2-7b-chat-hf/model_int4.g32.pth
source "$(dirname "$0")/speculate.sh"
