#!/usr/bin/env bash
# Llama-2-70B in 16 bits, on 8 devices or on RANKS=n; the draft is Llama-2-7B in 4 bits. Arguments go to generate.py.
RANKS=${RANKS:-8} exec "$(dirname "$0")/speculate.sh" meta-llama/Llama-2-70b-chat-hf/model.pth \
    meta-llama/Llama-2-7b-chat-hf/model_int4.g32.pth "$@"
