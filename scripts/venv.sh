# demo.sh and test.sh source this file. They set needs, the arguments of pip install. It makes .venv, again if needs or one
# of the requirements files has changed.
stamp=.venv/$(echo "$needs" | cat - requirements.txt requirements-dev.txt | cksum | tr -d ' ').done
if [ ! -f "$stamp" ]; then
    echo "Setting up .venv ..." >&2
    "${PYTHON:-python3}" -m venv .venv
    # shellcheck disable=SC2086  # needs is a list
    .venv/bin/pip install -q --disable-pip-version-check "${TORCH:-torch==2.13.0}" $needs
    touch "$stamp"
fi
