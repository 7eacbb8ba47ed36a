#!/usr/bin/env bash
# A setup of speculate.sh, under the name it has in gpt-fast.
exec "$(dirname "$0")/speculate.sh" 70B_int4 "$@"
