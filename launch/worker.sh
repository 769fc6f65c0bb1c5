#!/usr/bin/env bash
# One worker's side of launch/tpu_pod.sh, which calls it over ssh on every worker of a slice.
#
# usage: launch/worker.sh install | preflight [ARGUMENT ...] | state RUN | stop RUN | end RUN | kill RUN |
#        logs RUN LINES [follow] | start RUN [NAME=VALUE ...] -- MODULE [ARGUMENT ...]
#
# A run lives in ~/retro_runs/RUN: log, exit ("CODE TIME", when it has ended), pid, child, stopped.
# Each answer is one line, "retro-worker HOST VERB RESULT", which the caller counts: that gcloud
# ends well does not say that every worker answered.
set -euo pipefail
cd "$(dirname "$0")/.."

answer() { printf 'retro-worker %s %s\n' "${RETRO_WORKER_NAME:-$(hostname)}" "$*"; }

wrong() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0" >&2; exit 2; }

# A Python that the pinned versions are for; TPU images may have older ones only.
find_python() {
  local candidate
  for candidate in python3.11 python3.12; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import ensurepip, venv' 2>/dev/null
    then echo "$candidate"; return; fi
  done
  # Newer systems let pip install nothing without this; older pips do not know it.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv >&2
  python3 -m uv python install --quiet 3.11 >&2
  python3 -m uv python find --managed-python 3.11
}

install() {
  local python code=0
  command -v make >/dev/null || sudo -n apt-get install -y -qq make || true
  { python="$(find_python)" && make environment EXTRAS=tpu PYTHON="$python"; } || code=$?
  answer install "$code"
  return "$code"
}

preflight() {
  local code=0
  .venv/bin/python -m retro_jax.preflight --tpu "$@" || code=$?
  answer preflight "$code"
  return "$code"
}

# The shell around the run lives; after a reboot its number may be another process's.
alive() {
  local pid
  [[ -e "$run/pid" && ! -e "$run/exit" ]] || return
  pid="$(<"$run/pid")"
  kill -0 "$pid" 2>/dev/null || return
  [[ ! -r "/proc/$pid/cmdline" || "$(tr '\0' ' ' <"/proc/$pid/cmdline")" == *" around $run "* ]]
}

# In a session of its own, so that it outlives the ssh connection. The shell around it only waits
# and writes the exit code; a SIGTERM for all processes (the machine stops) does not end it early.
start() {
  local variables=() around
  while [[ $# -gt 0 && "$1" != -- ]]; do variables+=("$1"); shift; done
  [[ $# -ge 2 ]] || wrong
  shift
  if alive; then answer start busy; return 1; fi
  mkdir -p "$run"
  rm -f "$run"/{exit,stopped,child}
  # shellcheck disable=SC2016  # expanded by the inner shell
  around='run="$1"; shift; trap : TERM; "$@" & child=$!; echo "$child" >"$run/child"
    while :; do
      code=0; wait "$child" || code=$?
      kill -0 "$child" 2>/dev/null || break
    done
    echo "$code $(date +%s)" >"$run/exit.new"; mv "$run/exit.new" "$run/exit"'
  setsid nohup bash -c "$around" around "$run" env "${variables[@]}" \
    .venv/bin/python -u -m "$@" >>"$run/log" 2>&1 </dev/null &
  echo "$!" >"$run/pid"
  answer start ok
}

state() {
  if [[ -e "$run/exit" ]]; then
    if [[ -e "$run/stopped" ]]; then answer state stopped "$(<"$run/exit")"; return; fi
    answer state exited "$(<"$run/exit")"
  elif alive; then
    answer state running
  elif [[ -e "$run/exit" ]]; then
    answer state exited "$(<"$run/exit")"  # it ended just now
  elif [[ -e "$run/pid" ]]; then
    answer state exited 255 "$(date -r "$run/pid" +%s)"  # even the shell around it was killed
  else
    answer state none
  fi
}

signal() {
  if alive && [[ -e "$run/child" ]]; then kill -"$1" "$(<"$run/child")" 2>/dev/null || true; fi
}

[[ $# -ge 1 ]] || wrong
verb="$1"; shift
case "$verb" in
  install | preflight) "$verb" "$@"; exit ;;
esac
[[ $# -ge 1 && "$1" =~ ^[a-z0-9-]+$ ]] || wrong
run="$HOME/retro_runs/$1"; shift
case "$verb" in
  start | state) "$verb" "$@" ;;
  stop) if alive; then touch "$run/stopped"; fi; signal TERM; answer stop ok ;;
  # Not asked for by a person, so not marked: the caller decides what comes next.
  end) signal TERM; answer end ok ;;
  kill) signal KILL; answer kill ok ;;
  logs) exec tail -n "${1:-100}" ${2:+-F} "$run/log" ;;
  *) wrong ;;
esac
