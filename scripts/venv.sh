# Sourced by demo.sh and test.sh: makes .venv with what requirements-dev.txt lists, once for each version of the lists.
stamp=.venv/$(cat requirements.txt requirements-dev.txt | cksum | tr -d ' ').done
if [ ! -f "$stamp" ]; then
    echo "Setting up .venv ..." >&2
    "${PYTHON:-python3}" -m venv .venv
    # A machine without a GPU does best with PyTorch's CPU build, where pip has been told of one: TORCH=torch==2.13.0
    .venv/bin/pip install -q --disable-pip-version-check "${TORCH:-torch==2.13.0}" -r requirements-dev.txt
    touch "$stamp"
fi
