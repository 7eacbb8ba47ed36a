#!/usr/bin/env bash
# Llama-2-70B in 4 bits, Llama-2-7B in 4 bits as the draft.
#   before it: for s in 7b 70b; do MODES=int4 ./scripts/prepare.sh meta-llama/Llama-2-$s-chat-hf; done
#   ./scripts/speculate_70B_int4.sh --prompt "Hello, my name is"      arguments go to generate.py; TINY=1 takes tiny random models
set -euo pipefail
target=meta-llama/Llama-2-70b-chat-hf/model_int4.g32.pth
draft=meta-llama/Llama-2-7b-chat-hf/model_int4.g32.pth
source "$(dirname "$0")/speculate.sh"
