#!/usr/bin/env bash
# Any entry point on fake CPU devices: the code path of a pod slice, on this machine.
#
# usage: launch/local_cpu.sh [--devices N] MODULE [--gin_file=FILE ...] [--gin.NAME=VALUE ...]
#   e.g. launch/local_cpu.sh --devices 8 retro_jax.train --gin_file=... --dry_run
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

devices=8
if [[ "${1:-}" == --devices ]]; then devices="${2:?--devices needs a number}"; shift 2; fi
if [[ $# -eq 0 || "$1" == --help ]]; then sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2; fi
module="$1"; shift

cpu_environment "$devices"
exec env "${CPU_ENVIRONMENT[@]}" "${PYTHON:-python}" -u -m "$module" "$@" 3>&-
