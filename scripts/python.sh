# Sets python to .venv's Python, if there is one. prepare.sh, speculate.sh and mixtral-moe/generate.sh source this file.
# They must set root, the project's folder.
python=python3
if [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
