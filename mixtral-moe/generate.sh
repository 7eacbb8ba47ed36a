#!/usr/bin/env bash
# Generates text with the Mixtral that prepare.sh made, in int8 (MODEL=model.pth: 16 bits). Arguments go to generate.py.
# tp.sh sets launcher, the options of Python that start generate.py on several devices.
#   ./mixtral-moe/generate.sh --prompt "Hello, my name is"
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
repo=${MODEL_REPO:-mistralai/Mixtral-8x7B-Instruct-v0.1}
if [ -n "${TINY:-}" ]; then repo=tiny/mixtral; fi
python=python3
if [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
exec $python ${launcher:-} "$root/generate.py" --compile --checkpoint_path "$root/checkpoints/$repo/${MODEL:-model_int8.pth}" "$@"
