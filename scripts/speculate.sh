#!/usr/bin/env bash
# Speculation with a large model: ./scripts/speculate.sh SETUP --prompt "Hello, my name is"
#
#   SETUP          model                                   draft
#   7B_int4        Llama-2-7B, 16 bits                     Llama-2-7B, 4 bits
#   34B_bf16       CodeLlama-34B, 16 bits                  CodeLlama-7B, 4 bits
#   70B_int4       Llama-2-70B, 4 bits                     Llama-2-7B, 4 bits
#   tp_70B_bf16    Llama-2-70B, 16 bits, on 8 devices      Llama-2-7B, 4 bits       (RANKS=n: on n devices)
#
# More arguments go to generate.py. First make the files of both models (see below for their repositories) with
# MODES=int4 ./scripts/prepare.sh OWNER/NAME. TINY=1 instead makes and takes two tiny random models.
set -euo pipefail
from=$PWD run=
cd "$(dirname "$0")/.."
root=$PWD
source scripts/python.sh

llama=meta-llama/Llama-2 code=codellama/CodeLlama
draft=$llama-7b-chat-hf/model_int4.g32.pth
case ${1:-} in
7B_int4) target=$llama-7b-chat-hf/model.pth ;;
34B_bf16) target=$code-34b-Python-hf/model.pth draft=$code-7b-Python-hf/model_int4.g32.pth ;;
70B_int4) target=$llama-70b-chat-hf/model_int4.g32.pth ;;
tp_70B_bf16)
    target=$llama-70b-chat-hf/model.pth
    ranks=${TINY:+2}
    run="-m torch.distributed.run --standalone --nproc_per_node=${RANKS:-${ranks:-8}}"
    ;;
*)
    echo "usage: scripts/speculate.sh 7B_int4|34B_bf16|70B_int4|tp_70B_bf16 [arguments of generate.py]" >&2
    exit 2
    ;;
esac
shift

if [ -n "${TINY:-}" ]; then
    target=tiny/target/$(basename "$target") draft=tiny/draft/$(basename "$draft")
    for made in "llama2 $target" "qwen3 $draft"; do
        family=${made% *} file=${made#* } modes=
        [ ! -f "checkpoints/$file" ] || continue
        case $file in *int4*) modes=int4 ;; esac
        TINY_FAMILY=$family MODES=$modes ./scripts/prepare.sh "$(dirname "$file")"
    done
fi
cd "$from" # relative paths in the arguments start there
exec "$python" $run "$root/generate.py" --compile --speculate_k 5 --max_new_tokens 200 --temperature 0 \
    --checkpoint_path "$root/checkpoints/$target" --draft_checkpoint_path "$root/checkpoints/$draft" "$@"
