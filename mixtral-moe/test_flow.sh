#!/usr/bin/env bash
# Everything in the README: download, convert, quantize; text in 16, 8 and 4 bits; in 8 bits also on several devices.
# Arguments go to generate.py.
#   TINY=1 ./mixtral-moe/test_flow.sh --precision float32
set -euo pipefail
cd "$(dirname "$0")/.."
MODES="int8 int4" ./mixtral-moe/prepare.sh
for call in "generate.sh model.pth" "generate.sh model_int8.pth" "generate.sh model_int4.g32.pth" "tp.sh model_int8.pth"; do
    read -r script model <<<"$call"
    echo "== $call"
    MODEL=$model ./mixtral-moe/$script --prompt "Hello, my name is" --max_new_tokens 8 --temperature 0 "$@"
done
