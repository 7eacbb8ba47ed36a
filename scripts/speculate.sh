# speculate_*.sh source this file. They set target and draft, the paths of two files in checkpoints/, and may set run, the
# options of Python that start generate.py on several devices. TINY=1 makes two tiny random models and uses their files of
# the same names.
from=$PWD python=python3
cd "$(dirname "$0")/.."
root=$PWD
if [ -x .venv/bin/python ]; then python=$root/.venv/bin/python; fi
if [ -n "${TINY:-}" ]; then
    target=tiny/target/$(basename "$target") draft=tiny/draft/$(basename "$draft")
    for made in "llama2 $target" "qwen3 $draft"; do
        family=${made% *} file=${made#* } modes=
        [ ! -f "checkpoints/$file" ] || continue
        case $file in *int4*) modes=int4 ;; esac
        TINY_FAMILY=$family MODES=$modes ./scripts/prepare.sh "$(dirname "$file")"
    done
fi
cd "$from" # so that relative paths in the arguments work
exec $python ${run:-} "$root/generate.py" --compile --speculate_k 5 --max_new_tokens 200 --temperature 0 \
    --checkpoint_path "$root/checkpoints/$target" --draft_checkpoint_path "$root/checkpoints/$draft" "$@"
