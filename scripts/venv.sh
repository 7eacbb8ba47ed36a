# Makes .venv. demo.sh and test.sh source this file and set needs, the arguments of pip install. When needs or one of
# the requirements files changes, the packages are installed again.
stamp=.venv/$(echo "$needs" | cat - requirements.txt requirements-dev.txt | cksum | tr -d ' ').done
if [ ! -f "$stamp" ]; then
    echo "Setting up .venv ..." >&2
    "${PYTHON:-python3}" -m venv .venv
    # shellcheck disable=SC2086  # needs is a list
    .venv/bin/pip install -q --disable-pip-version-check "${TORCH:-torch==2.13.0}" $needs
    touch "$stamp"
fi
