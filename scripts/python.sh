# Sets python: that of .venv if there is one. prepare.sh, speculate.sh and mixtral-moe/generate.sh source this file, with
# the project's folder as root.
python=python3
if [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
