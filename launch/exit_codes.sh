# shellcheck shell=bash
# What the trainer's exit codes mean to a launcher; sourced, runs nothing. docs/pods.md has the table.

# shellcheck disable=SC2034  # used by those who source this
readonly EXIT_DONE=0 EXIT_BAD_INPUT=2 EXIT_WORKER_LOST=69 EXIT_NOT_FINITE=70 EXIT_PREEMPTED=75

# after CODE: what a launcher does then: done, stop, relaunch, or count (relaunch a few times).
after() {
  case "$1" in
    "$EXIT_DONE") echo 'done' ;;
    "$EXIT_BAD_INPUT" | "$EXIT_NOT_FINITE") echo stop ;;
    "$EXIT_WORKER_LOST" | "$EXIT_PREEMPTED") echo relaunch ;;
    *) echo count ;;
  esac
}

# meaning CODE: the code in words.
meaning() {
  case "$1" in
    "$EXIT_DONE") echo 'done' ;;
    "$EXIT_BAD_INPUT") echo 'bad input or settings; correct them, the log names what' ;;
    "$EXIT_WORKER_LOST") echo 'a worker was missing at the start or was lost' ;;
    "$EXIT_NOT_FINITE") echo 'the loss or a gradient was not finite; look at the log before going on' ;;
    "$EXIT_PREEMPTED") echo 'stopped by SIGTERM after a checkpoint' ;;
    124 | 137) echo 'killed: out of memory, or out of time' ;;
    255) echo 'ssh failed, or the process ended without saying why' ;;
    *) echo 'failed; look at the log' ;;
  esac
}

# decide "CODE TIME" ...: the code of a job from those of its workers. One that forbids another try
# wins (the others then only lost a worker); else the code of the worker that failed first; else 0.
decide() {
  local entry code when first='' decided=$EXIT_DONE
  for entry in "$@"; do
    code="${entry%% *}" when="${entry##* }"
    if [[ $(after "$code") == stop ]]; then echo "$code"; return; fi
    if [[ "$code" -ne 0 ]] && { [[ -z "$first" ]] || [[ "$when" -lt "$first" ]]; }; then
      first="$when" decided="$code"
    fi
  done
  echo "$decided"
}
