#!/usr/bin/env bash
# Train a recipe with torchrun:  launch/torchrun.sh RECIPE [--setting value ...]
# On each of several machines, with the same MASTER_ADDR:
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh RECIPE ...
set -euo pipefail
export PYTHONSAFEPATH=1
exec torchrun \
    --nnodes "${NODES:-1}" \
    --node_rank "${NODE_RANK:-0}" \
    --nproc_per_node "${PROCESSES:-gpu}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" \
    --master_port "${MASTER_PORT:-29500}" \
    --module vadit train "$@"
