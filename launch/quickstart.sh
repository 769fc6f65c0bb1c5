#!/usr/bin/env bash
# The whole path on this machine's own text; see retro_jax/quickstart.py.
#
# usage: launch/quickstart.sh [--dry_run] [--gin_file=FILE ...] [--gin.NAME=VALUE ...]
#
# Runs on fake CPU devices, so that sharding is the same code as on a pod.
set -euo pipefail
cd "$(dirname "$0")/.."

# DEVICES fake devices, each with its share of the batch; the library for matrix products is XLA:CPU's fastest for GELU.
export XLA_FLAGS="--xla_force_host_platform_device_count=${DEVICES:-4} --xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT ${XLA_FLAGS:-}"
export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 OMP_WAIT_POLICY=passive

exec python -u -m retro_jax.quickstart --gin_file=gin/runs/quickstart.gin "$@"
