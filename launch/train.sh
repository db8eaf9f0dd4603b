#!/usr/bin/env bash
# Train a recipe with the deepspeed launcher:  launch/train.sh RECIPE [--setting value ...]
#   PROCESSES=4          that many processes on this machine (default: one per GPU)
#   RESTARTS=3           start again after a failure, from the last checkpoint, so many times (default: 0)
# Several machines, reached by ssh from this one:
#   HOSTFILE=my_hosts    see hostfile.example
# Several machines without ssh: the same command on each, with its NODE_RANK from 0:
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 PROCESSES=8 launch/train.sh RECIPE ...
#   MASTER_ADDR          the machine with NODE_RANK=0, as the others reach it;  MASTER_PORT (default: 29500)
#   HOSTFILE             in place of NODES and PROCESSES where machines have different numbers of GPUs
set -euo pipefail
export PYTHONSAFEPATH=1
# shellcheck source=launch/supervise.sh
source "$(dirname "${BASH_SOURCE[0]}")/supervise.sh"

launcher_command=(deepspeed --quiet --master_port "${MASTER_PORT:-29500}")
levels=2 # deepspeed starts a launcher of this machine, and that one the processes
if [[ -n ${NODE_RANK:-} ]]; then
    : "${MASTER_ADDR:?is needed with NODE_RANK: the address of the machine with NODE_RANK=0}"
    if [[ -z ${HOSTFILE:-} ]]; then
        : "${NODES:?is needed with NODE_RANK: the number of machines}" "${PROCESSES:?is needed with NODE_RANK: per machine}"
        HOSTFILE=$(mktemp)
        trap 'rm -f "$HOSTFILE"' EXIT
        for ((node = 0; node < NODES; node++)); do
            echo "node-$node slots=$PROCESSES" # names do not matter without ssh
        done >"$HOSTFILE"
    fi
    launcher_command+=(--hostfile "$HOSTFILE" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
elif [[ -n ${HOSTFILE:-} ]]; then
    levels=0 # they are on other machines: a signal goes to the launcher, which ends them
    launcher_command+=(--hostfile "$HOSTFILE")
elif [[ -n ${PROCESSES:-} ]]; then
    launcher_command+=(--num_accelerators "$PROCESSES")
fi
supervise "$levels" "${launcher_command[@]}" --module vadit train "$@"
