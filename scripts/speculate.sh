# Sourced by speculate_*.sh with target and draft, two files below checkpoints/, and run, what starts generate.py.
# TINY=1 makes two tiny random models and takes their files of the same names.
from=$PWD python=python3
cd "$(dirname "$0")/.."
root=$PWD
if [ -x .venv/bin/python ]; then python=$root/.venv/bin/python; fi
if [ -n "${TINY:-}" ]; then
    target=tiny/target/$(basename "$target") draft=tiny/draft/$(basename "$draft")
    for made in "llama2 $target" "qwen3 $draft"; do
        file=checkpoints/${made#* } folder=checkpoints/$(dirname "${made#* }")
        [ ! -f "$file" ] || continue
        $python -m tests.tiny "${made% *}" "$folder"
        $python scripts/convert_hf_checkpoint.py --checkpoint_dir "$folder"
        case $file in *int4*) $python quantize.py --checkpoint_path "$folder/model.pth" --mode int4 ;; esac
    done
fi
cd "$from" # where the paths in the arguments begin
exec $python ${run:-} "$root/generate.py" --compile --speculate_k 5 --max_new_tokens 200 --temperature 0 \
    --checkpoint_path "$root/checkpoints/$target" --draft_checkpoint_path "$root/checkpoints/$draft" "$@"
