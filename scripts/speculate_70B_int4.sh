#!/usr/bin/env bash
# Llama-2-70B in 4 bits; the draft is Llama-2-7B in 4 bits. Arguments go to generate.py.
exec "$(dirname "$0")/speculate.sh" meta-llama/Llama-2-70b-chat-hf/model_int4.g32.pth \
    meta-llama/Llama-2-7b-chat-hf/model_int4.g32.pth "$@"
