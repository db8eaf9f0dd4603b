#!/usr/bin/env bash
# Train a recipe with the deepspeed launcher:  launch/train.sh RECIPE [--setting value ...]
#   PROCESSES=4          that many processes on this machine (default: one per GPU)
#   HOSTFILE=my_hosts    several machines, reached by ssh (see hostfile.example)
set -euo pipefail
export PYTHONSAFEPATH=1
launcher=(deepspeed)
if [[ -n ${HOSTFILE:-} ]]; then
    launcher+=(--hostfile "$HOSTFILE")
elif [[ -n ${PROCESSES:-} ]]; then
    launcher+=(--num_accelerators "$PROCESSES")
fi
exec "${launcher[@]}" --module vadit train "$@"
