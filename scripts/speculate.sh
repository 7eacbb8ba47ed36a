# Sourced by speculate_*.sh with target and draft, two files below checkpoints/, and run, what starts generate.py.
# TINY=1 makes two tiny random models and takes their files of the same names.
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
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
exec $python ${run:-} generate.py --compile --speculate_k 5 --max_new_tokens 200 --temperature 0 \
    --checkpoint_path "checkpoints/$target" --draft_checkpoint_path "checkpoints/$draft" "$@"
