# Sourced by demo.sh and test.sh, with what pip shall install in needs: makes .venv, once for each version of the lists.
stamp=.venv/$(echo "$needs" | cat - requirements.txt requirements-dev.txt | cksum | tr -d ' ').done
if [ ! -f "$stamp" ]; then
    echo "Setting up .venv ..." >&2
    "${PYTHON:-python3}" -m venv .venv
    # shellcheck disable=SC2086  # needs is a list
    .venv/bin/pip install -q --disable-pip-version-check "${TORCH:-torch==2.13.0}" $needs
    touch "$stamp"
fi
