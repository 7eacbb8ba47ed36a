#!/usr/bin/env bash
# A setup of speculate.sh, under the name it has in gpt-fast.
exec "$(dirname "$0")/speculate.sh" tp_70B_bf16 "$@"
