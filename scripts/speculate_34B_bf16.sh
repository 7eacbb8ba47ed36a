#!/usr/bin/env bash
# CodeLlama-34B in 16 bits, CodeLlama-7B in 4 bits as the draft.
#   before it: ./scripts/prepare.sh codellama/CodeLlama-34b-Python-hf; MODES=int4 ./scripts/prepare.sh codellama/CodeLlama-7b-Python-hf
#   ./scripts/speculate_34B_bf16.sh --prompt "Hello, my name is"      arguments go to generate.py; TINY=1 takes tiny random models
set -euo pipefail
target=codellama/CodeLlama-34b-Python-hf/model.pth
draft=codellama/CodeLlama-7b-Python-hf/model_int4.g32.pth
source "$(dirname "$0")/speculate.sh"
