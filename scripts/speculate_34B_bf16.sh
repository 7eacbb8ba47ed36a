#!/usr/bin/env bash
# CodeLlama-34B in 16 bits; the draft is CodeLlama-7B in 4 bits. Arguments go to generate.py.
exec "$(dirname "$0")/speculate.sh" codellama/CodeLlama-34b-Python-hf/model.pth \
    codellama/CodeLlama-7b-Python-hf/model_int4.g32.pth "$@"
