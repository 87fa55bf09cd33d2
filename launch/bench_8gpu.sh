#!/usr/bin/env bash
# Everything about the GPUs of this machine in one table, within nine minutes: speed, memory, scaling, faults.
#
#   launch/bench_8gpu.sh OUT [--deadline SECONDS]
#   launch/bench_8gpu.sh OUT --tiny                  the small O1, PROCESSES=N (2) processes on the CPU
#
#   OUT          a new folder: table.md, results.json, logs/, rows/ with a file for each line of the table
#   GPUS=N       so many of them, an even number; unset: all that CUDA_VISIBLE_DEVICES leaves
#
# Random weights of the 8B shapes and random pixels say nothing of quality. hdl/fleet/__main__.py has the parts.
set -euo pipefail
cd_from="$PWD"
out="${1:?usage: launch/bench_8gpu.sh OUT [--deadline SECONDS] [--tiny]}"
shift
case "$out" in /*) ;; *) out="$cd_from/$out" ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! command -v torchrun >/dev/null; then # an environment that is entered already comes first
    . launch/environment.sh
    make_environment ""
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}" # multicast over NVLink fails on some hosts; nothing here needs it
exec python -m hdl.fleet "$out" "$@"
