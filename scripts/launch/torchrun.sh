#!/usr/bin/env bash
# One recipe on one or several hosts, data-parallel.
#   scripts/launch/torchrun.sh RECIPE [key=value ...]                                     all GPUs of this host (2 processes on a CPU)
#   HOSTS=2 HEAD=10.0.0.1:29500 scripts/launch/torchrun.sh RECIPE [key=value ...]         the same command on each of two hosts
# The output folder must be one that all hosts see.
set -euo pipefail
if command -v nvidia-smi >/dev/null && count=$(nvidia-smi --list-gpus | wc -l) && [ "$count" -gt 0 ]; then
    processes=${PROCESSES:-$count}
else
    processes=${PROCESSES:-2}
fi
if [ "${HOSTS:-1}" -gt 1 ]; then
    where=(--nnodes "$HOSTS" --rdzv-backend c10d --rdzv-id mmkd --rdzv-endpoint "${HEAD:?HEAD=host:port of the first host}")
else
    where=(--standalone)
fi
exec torchrun "${where[@]}" --nproc-per-node "$processes" -m mmkd.cli distill "$@"
