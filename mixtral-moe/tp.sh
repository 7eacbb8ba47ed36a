#!/usr/bin/env bash
# generate.sh on several GPUs, each with its part of every matrix. Without GPUs it starts processes on the CPU.
#   NPROC=4 ./mixtral-moe/tp.sh --prompt "Hello, my name is"
launcher="-m torch.distributed.run --standalone --nproc_per_node=${NPROC:-2}" exec "$(dirname "$0")/generate.sh" "$@"
