#!/usr/bin/env bash
# One of the set-ups of speculate.sh, by the name that gpt-fast gave it.
exec "$(dirname "$0")/speculate.sh" 7B_int4 "$@"
