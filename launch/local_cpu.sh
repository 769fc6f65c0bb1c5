#!/usr/bin/env bash
# Any entry point on fake CPU devices: the code path of a pod slice, on this machine.
#
# usage: launch/local_cpu.sh [--devices N] MODULE [--gin_file=FILE ...] [--gin.NAME=VALUE ...]
#   e.g. launch/local_cpu.sh --devices 8 retro_jax.train --gin_file=... --dry_run
set -euo pipefail

devices=8
if [[ "${1:-}" == --devices ]]; then devices="${2:?--devices needs a number}"; shift 2; fi
if [[ $# -eq 0 || "$1" == --help ]]; then sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2; fi
module="$1"; shift

export XLA_FLAGS="--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT ${XLA_FLAGS:-} --xla_force_host_platform_device_count=${devices}"
export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 OMP_WAIT_POLICY=passive
exec "${PYTHON:-python}" -u -m "$module" "$@"
