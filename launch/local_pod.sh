#!/usr/bin/env bash
# Any entry point in N processes of M fake devices each: a pod of N workers, on this machine.
#
# usage: launch/local_pod.sh [--dry_run] N M MODULE [ARGUMENT ...]
#   e.g. launch/local_pod.sh 2 4 retro_jax.train --gin_file=... --gin.RUN_DIR=/tmp/run
#
# The processes are told of each other by RETRO_COORDINATOR, RETRO_NUM_PROCESSES and
# RETRO_PROCESS_ID. Each line of output begins with the process's number. SIGTERM and SIGINT go to
# all. When one fails the others get SIGTERM and, RETRO_GRACE_SECONDS (60) later, SIGKILL; the exit
# code is that of the first that failed, 0 when none did. RETRO_START_TIMEOUT (120): seconds a
# process waits at its start for the others. PYTHON (python): the interpreter.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
set -m  # each process in a group of its own: Ctrl-C reaches this script only, which passes it on

while [[ "${1:-}" == -* ]]; do
  case "$1" in
    --help | -h) usage; exit 0 ;;
    --dry_run | --dry-run) DRY_RUN=1; shift ;;
    *) bad "unknown argument '$1'" ;;
  esac
done
if [[ $# -lt 3 ]]; then usage >&2; exit "$EXIT_BAD_INPUT"; fi
processes="$1" devices="$2"
number N "$processes"; number M "$devices"
if [[ "$processes" -eq 0 || "$devices" -eq 0 ]]; then bad 'N and M are at least 1'; fi
shift 2
check_module "$@"
grace="${RETRO_GRACE_SECONDS:-60}" python="${PYTHON:-python}"
number RETRO_GRACE_SECONDS "$grace"
command -v "$python" >/dev/null || bad "$python: not found; source .venv/bin/activate, or set PYTHON"

port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
cpu_environment "$devices"
shared=(
  "${CPU_ENVIRONMENT[@]}" JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
  RETRO_COORDINATOR="127.0.0.1:${port}" RETRO_NUM_PROCESSES="$processes"
  RETRO_START_TIMEOUT="${RETRO_START_TIMEOUT:-120}"
)
if [[ -n "$DRY_RUN" ]]; then
  for ((i = 0; i < processes; i++)); do
    printf '%s &\n' "$(quoted env "${shared[@]}" RETRO_PROCESS_ID="$i" "$python" -u -m "$@")"
  done
  echo wait
  exit 0
fi

pipes="$(mktemp -d)"
pids=() readers=() signalled='' failed=''

# shellcheck disable=SC2317,SC2329  # called by a trap
pass_on() {
  signalled="$1"
  say "SIG$1: passed on to $processes processes; waiting for them" 2>&4
  kill -"$1" "${pids[@]}" 2>/dev/null || true
}
exec 4>&2
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

# Whatever the processes started goes with them, however this script ends.
# shellcheck disable=SC2317,SC2329  # called by a trap
clean_up() {
  local pid
  for pid in "${pids[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
  rm -rf "$pipes"
}
trap clean_up EXIT

for ((i = 0; i < processes; i++)); do
  mkfifo "$pipes/$i"
  sed -u "s/^/[$i] /" <"$pipes/$i" 3>&- 4>&- &
  readers+=("$!")
  env "${shared[@]}" RETRO_PROCESS_ID="$i" "$python" -u -m "$@" >"$pipes/$i" 2>&1 3>&- 4>&- </dev/null &
  pids+=("$!")
done
set +m
if [[ -n "$signalled" ]]; then kill -TERM "${pids[@]}" 2>/dev/null || true; fi  # it came meanwhile
# Bash reports each process that a signal ended, in its own words: not from here on, where 2 leads
# nowhere and messages go to 4.
exec 2>/dev/null

# End the others: gently, so that they may save, then for good. The killer waits in the background.
end_others() {
  if [[ -z "$signalled" ]]; then kill -TERM "${pids[@]}" 2>/dev/null || true; fi
  set -m
  (sleep "$grace" && kill -KILL "${pids[@]}" 2>/dev/null) >/dev/null 2>&1 3>&- 4>&- &
  killer="$!"
  set +m
}

killer='' left=("${!pids[@]}")
while [[ ${#left[@]} -gt 0 ]]; do
  ended=() still=()
  for i in "${left[@]}"; do
    if kill -0 "${pids[$i]}" 2>/dev/null; then still+=("$i"); else ended+=("$i"); fi
  done
  left=("${still[@]}")
  for i in "${ended[@]}"; do
    code=0
    wait "${pids[$i]}" || code=$?
    if [[ "$code" -eq 0 ]]; then continue; fi
    if [[ -z "$failed" ]]; then
      say "process $i ended with exit code $code: $(meaning "$code")" 2>&4
      failed="$code"
      if [[ ${#left[@]} -gt 0 ]]; then end_others; fi
    elif [[ ${#ended[@]} -gt 1 && $(after "$failed") != stop && $(after "$code") == stop ]]; then
      failed="$code"  # of two that ended together the one that says why
    fi
  done
  if [[ ${#ended[@]} -eq 0 ]]; then sleep 0.05; fi
done
if [[ -n "$killer" ]]; then kill -KILL -- "-$killer" 2>/dev/null || true; fi
# The last lines; what a process left behind may hold its pipe open for ever.
for reader in "${readers[@]}"; do
  for ((i = 0; i < 50; i++)); do
    kill -0 "$reader" 2>/dev/null || break
    sleep 0.1
  done
done
exit "${failed:-0}"
