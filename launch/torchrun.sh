#!/usr/bin/env bash
# Train a recipe with torchrun:  launch/torchrun.sh RECIPE [--setting value ...]
#   PROCESSES=4          that many processes on this machine (default: one per GPU)
#   RESTARTS=3           start again after a failure, from the last checkpoint, so many times (default: 0)
# Several machines: the same command on each, with its NODE_RANK from 0:
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh RECIPE ...
#   MASTER_ADDR          the machine with NODE_RANK=0, as the others reach it;  MASTER_PORT (default: 29500)
#   LOCAL_ADDR           this machine's address, where its host name does not lead the others to it
set -euo pipefail
export PYTHONSAFEPATH=1
# shellcheck source=launch/supervise.sh
source "$(dirname "${BASH_SOURCE[0]}")/supervise.sh"

# Else torchrun keeps one store over its restarts, in which new processes may find their predecessors' addresses.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
launcher_command=(torchrun --nproc_per_node "${PROCESSES:-gpu}" --max_restarts "${RESTARTS:-0}")
if ((${NODES:-1} > 1)); then
    address=${MASTER_ADDR:?is needed with NODES: the address of the machine with NODE_RANK=0} port=${MASTER_PORT:-29500}
    # With this rendezvous all machines start again together when the processes of one fail.
    launcher_command+=(--nnodes "$NODES" --rdzv_backend c10d --rdzv_endpoint "$address:$port" --rdzv_id "vadit-$port"
        --rdzv_conf "is_host=$((${NODE_RANK:?is needed with NODES} == 0))")
    [[ -z ${LOCAL_ADDR:-} ]] || launcher_command+=(--local_addr "$LOCAL_ADDR")
else
    launcher_command+=(--standalone --local_addr "${LOCAL_ADDR:-127.0.0.1}")
fi
RESTARTS=0 # they are torchrun's
supervise 1 "${launcher_command[@]}" --module vadit train "$@"
