#!/usr/bin/env bash
# Starts a teacher for `teacher.served` on loopback with vLLM's build for CPUs; ends with the process (^C).
# Usage: scripts/serve/start_vllm.sh ENVIRONMENT MODEL PORT [options of `vllm serve`]
# ENVIRONMENT is the folder of install_vllm.sh. On a GPU, `vllm serve MODEL --enable-scale-out --max-logprobs 20` is enough.
set -euo pipefail

environment=${1:?usage: start_vllm.sh ENVIRONMENT MODEL PORT [options]}
model=${2:?the folder or id of a model is missing}
port=${3:?the port is missing}
shift 3

export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_HOST_IP=127.0.0.1
# Small models: one core, a gigabyte for keys and values. Raise them for larger ones.
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
openmp="$environment/lib/libiomp5.so"
if [ -e "$openmp" ]; then export LD_PRELOAD="$openmp"; fi

# float32 and no chunks: what it says is then what the same weights say in training, to 1e-5.
exec "$environment/bin/vllm" serve "$model" --host 127.0.0.1 --port "$port" --dtype float32 --enforce-eager \
    --max-model-len 512 --max-num-seqs 4 --max-num-batched-tokens 1024 --max-logprobs 20 --enable-scale-out "$@"
