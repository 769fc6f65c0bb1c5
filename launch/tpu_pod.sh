#!/usr/bin/env bash
# A training run on a Cloud TPU slice: asks for the slice, installs, runs, and goes on after
# preemption. docs/pods.md tells more.
#
# usage: launch/tpu_pod.sh COMMAND [FLAG ...] [-- MODULE [ARGUMENT ...]]
#   e.g. launch/tpu_pod.sh train --name retro-1 --type v5litepod-16 --zone us-west4-a \
#            --project my-project --spot --bucket gs://my-bucket/runs \
#            -- retro_jax.train --gin_file=... --gin.NAME=VALUE
#
#   train      create + install + preflight + run, waits, and relaunches until the run is done;
#              called again it goes on watching a run that is still there
#   create     the slice as a queued resource, or the one that is there; waits until it is usable
#   install    this commit and its environment on every worker
#   preflight  checks on every worker; see retro_jax/preflight.py
#   run        the training command on every worker, in the background
#   status     of the slice, the workers and the checkpoints
#   logs       of the run: --worker N or all (0), --lines N (100), --follow
#   stop       SIGTERM on every worker, so that it saves; waits for it; train does not relaunch then
#   delete     the slice, whatever runs on it
#
# Flags, each also as a variable (--zone is RETRO_ZONE):
#   --name NAME        of slice and run; required, as are --zone, --project and, to create, --type
#   --type TYPE        accelerator type, e.g. v5litepod-16
#   --runtime VERSION  of the TPU's software (default: by the type)
#   --bucket gs://...  run folder is BUCKET/NAME unless the command has --gin.RUN_DIR
#   --valid_until D    the request expires after this duration, e.g. 6h (default: never)
#   --wait SECONDS     for the slice to become usable (21600)
#   --port N           the coordinator's, for preflight (8482)
#   --start_timeout N  seconds a worker waits for the others at its start (300)
#   --max_failures N   relaunches in a row without a new checkpoint, after other failures than
#                      preemption and lost workers (3)
#   --max_relaunches N the same for preemption and lost workers (50)
# Without a variable:
#   --spot, --reserved            how the slice is paid for
#   --env NAME=VALUE              for the training command; may be repeated
#   --create_flag=FLAG            passed on to gcloud ... create; may be repeated
#   --internal_ip                 ssh by internal addresses
#   --allow_dirty                 installs changed tracked files too, not only HEAD
#   --delete_at_end               deletes the slice when train ends for good
#   --dry_run                     prints the commands and runs none
#
# Exit codes: that of the training command (launch/exit_codes.sh), 2 for bad input, 69 when there
# is no slice or no answer. RETRO_POLL_SECONDS (30): between two looks at the workers.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

case "${1:-}" in
  train | create | install | preflight | run | status | logs | stop | delete) command="$1"; shift ;;
  --help | -h) usage; exit 0 ;;
  '') usage >&2; exit "$EXIT_BAD_INPUT" ;;
  *) bad "unknown command '$1'; expected train, create, install, preflight, run, status, logs," \
         "stop or delete" ;;
esac

name="${RETRO_NAME:-}" type="${RETRO_TYPE:-}" zone="${RETRO_ZONE:-}" project="${RETRO_PROJECT:-}"
runtime="${RETRO_RUNTIME:-}" bucket="${RETRO_BUCKET:-}" valid_until="${RETRO_VALID_UNTIL:-}"
wait="${RETRO_WAIT:-21600}" port="${RETRO_PORT:-8482}" start_timeout="${RETRO_START_TIMEOUT:-300}"
max_failures="${RETRO_MAX_FAILURES:-${MAX_FAILURES:-3}}"
max_relaunches="${RETRO_MAX_RELAUNCHES:-50}"
payment=() variables=() create_flags=() ssh_flags=() allow_dirty='' delete_at_end=''
worker=0 lines=100 follow='' training=()
while [[ $# -gt 0 ]]; do
  argument="$1"
  if [[ "$argument" == --*=* && "$argument" != --env=* ]]; then
    set -- "${argument%%=*}" "${argument#*=}" "${@:2}"
  fi
  case "$1" in
    --name) name="$(value "$@")"; shift 2 ;;
    --type) type="$(value "$@")"; shift 2 ;;
    --zone) zone="$(value "$@")"; shift 2 ;;
    --project) project="$(value "$@")"; shift 2 ;;
    --runtime) runtime="$(value "$@")"; shift 2 ;;
    --bucket) bucket="$(value "$@")"; shift 2 ;;
    --valid_until) valid_until="$(value "$@")"; shift 2 ;;
    --wait) wait="$(value "$@")"; shift 2 ;;
    --port) port="$(value "$@")"; shift 2 ;;
    --start_timeout) start_timeout="$(value "$@")"; shift 2 ;;
    --max_failures) max_failures="$(value "$@")"; shift 2 ;;
    --max_relaunches) max_relaunches="$(value "$@")"; shift 2 ;;
    --worker) worker="$(value "$@")"; shift 2 ;;
    --lines) lines="$(value "$@")"; shift 2 ;;
    --create_flag) create_flags+=("$(value "$@")"); shift 2 ;;
    --env=*) variables+=("${1#--env=}"); shift ;;
    --env) variables+=("$(value "$@")"); shift 2 ;;
    --follow) follow=1; shift ;;
    --spot | --reserved) payment=("$1"); shift ;;
    --internal_ip) ssh_flags+=(--internal-ip); shift ;;
    --allow_dirty | --allow-dirty) allow_dirty=1; shift ;;
    --delete_at_end) delete_at_end=1; shift ;;
    --dry_run | --dry-run) DRY_RUN=1; shift ;;
    --help | -h) usage; exit 0 ;;
    --) shift; training=("$@"); break ;;
    *) bad "unknown argument '$argument'" ;;
  esac
done

for flag in name zone project; do
  [[ -n "${!flag}" ]] || bad "--$flag is required (or RETRO_${flag^^})"
done
check_run "$name" "$bucket" "${variables[@]}"
for flag in wait port start_timeout max_failures max_relaunches lines; do
  number "--$flag" "${!flag}"
done
[[ "$worker" == all || "$worker" =~ ^[0-9]+$ ]] || bad "--worker is '$worker', expected a number or all"
if [[ "$command" == train || "$command" == create ]]; then
  [[ -n "$type" ]] || bad '--type is required (or RETRO_TYPE), e.g. v5litepod-16'
fi
if [[ "$command" == train || "$command" == run ]]; then
  check_module "${training[@]}"
elif [[ ${#training[@]} -gt 0 && "$command" != preflight && "$command" != status ]]; then
  bad "$command takes no training command"
fi
if [[ -z "$runtime" ]]; then
  case "$type" in
    v6e*) runtime=v2-alpha-tpuv6e ;;
    v5p*) runtime=v2-alpha-tpuv5 ;;
    v5lite*) runtime=v2-alpha-tpuv5-lite ;;
    *) runtime=tpu-ubuntu2204-base ;;
  esac
fi
run_dir="$(setting RUN_DIR "${training[@]}")"
if [[ -z "$run_dir" && -n "$bucket" ]]; then
  run_dir="${bucket%/}/$name"
  if [[ ${#training[@]} -gt 0 ]]; then training+=("--gin.RUN_DIR=$run_dir"); fi
fi

poll="${RETRO_POLL_SECONDS:-30}"         # between two looks
ask="${RETRO_ASK_SECONDS:-120}"          # for an answer of gcloud itself
reach="${RETRO_REACH_SECONDS:-240}"      # for a short command on all workers; gcloud tries 10 times
build="${RETRO_INSTALL_SECONDS:-1800}"   # for the environment
grace="${RETRO_GRACE_SECONDS:-300}"      # for a worker to save and end
settle="${RETRO_SETTLE_SECONDS:-60}"     # from the end of a run until gcloud knows of a preemption
patience="${RETRO_UNREACHABLE:-10}"      # looks in a row without all answers

root="$(cd "$(dirname "$0")/.." && pwd)"
archive="${TMPDIR:-/tmp}/retro_jax-$name.tar.gz"
where=(--zone="$zone" --project="$project" --quiet)
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
[[ -n "$DRY_RUN" ]] || command -v gcloud >/dev/null ||
  bad 'gcloud: not found; install the Google Cloud CLI'

# ---- The slice.

# described KIND FORMAT: what gcloud says of the slice; ABSENT, or UNREACHABLE without an answer.
described() {
  local said code=0
  said="$(call "$ask" gcloud compute tpus "$1" describe "$name" "${where[@]}" \
    "--format=value($2)" 2>"$scratch/error")" || code=$?
  if [[ $code -eq 0 ]]; then
    echo "$said"
  elif grep -qiE 'NOT_FOUND|was not found' "$scratch/error"; then
    echo ABSENT
  else
    cat "$scratch/error" >&2
    echo UNREACHABLE
  fi
}

# ready; coming; gone: there is nothing to wait for; absent; unknown: gcloud gave no answer.
health() {
  case "$(described queued-resources state.state)" in
    ACTIVE) ;;
    ABSENT) echo absent; return ;;
    UNREACHABLE) echo unknown; return ;;
    SUSPENDED | SUSPENDING | FAILED | DELETING) echo gone; return ;;
    *) echo coming; return ;;
  esac
  case "$(described tpu-vm state)" in
    READY) echo ready ;;
    UNREACHABLE) echo unknown ;;
    ABSENT | PREEMPTED | TERMINATED | DELETING | STOPPING | STOPPED) echo gone ;;
    *) echo coming ;;
  esac
}

request_slice() {
  call "$ask" gcloud compute tpus queued-resources create "$name" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$runtime" "${where[@]}" --async \
    "${payment[@]}" ${valid_until:+"--valid-until-duration=$valid_until"} "${create_flags[@]}"
}

delete_slice() {
  call "$((ask * 5))" gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force ||
    say 'the slice could not be deleted yet; looking again'
}

# A usable slice: the one there is, or a new one.
ensure_slice() {
  local state='' before='' deadline=$((SECONDS + wait)) requests=0 silent=0 code
  if [[ -n "$DRY_RUN" ]]; then
    described queued-resources state.state >/dev/null
    note 'unless it is there:'
    request_slice
    note "every $poll s, at most $wait s, until ACTIVE and READY:"
    described queued-resources state.state >/dev/null
    described tpu-vm state >/dev/null
    return
  fi
  while :; do
    state="$(health)"
    if [[ "$state" != "$before" ]]; then say "slice $name is $state"; before="$state"; fi
    case "$state" in
      ready) return ;;
      gone)
        say "gcloud says: $(described queued-resources state); deleting what is left of it"
        delete_slice ;;
      absent)
        requests=$((requests + 1))
        [[ $requests -le $((max_failures + 1)) ]] || die "$EXIT_WORKER_LOST" \
          "slice $name: $((requests - 1)) requests came to nothing; see gcloud's messages above"
        say "asking for slice $name: $type in $zone ${payment[*]}"
        code=0
        request_slice || code=$?
        # gcloud's own 2 is a wrong flag: trying again will not help.
        [[ $code -ne 2 ]] || die "$EXIT_BAD_INPUT" 'gcloud refused the request; see above' ;;
      unknown)
        if grep -q 'active account' "$scratch/error"; then
          bad 'gcloud is not logged in: gcloud auth login'
        fi
        silent=$((silent + 1))
        [[ $silent -lt $patience ]] || die "$EXIT_WORKER_LOST" \
          "gcloud gave no answer $silent times; see above, then the network and gcloud auth login" ;;
    esac
    [[ $SECONDS -lt $deadline ]] || die "$EXIT_WORKER_LOST" "slice $name was not usable within" \
      "$wait s; call again to go on waiting, or 'delete' takes the request back"
    sleep "$poll"
  done
}

# Sets `expected`, the number of workers.
count_workers() {
  local said
  said="$(described tpu-vm 'networkEndpoints[].ipAddress')"
  if [[ -n "$DRY_RUN" ]]; then expected=1; return; fi
  expected="$(tr ';, ' '\n' <<<"$said" | grep -c '[.:]' || true)"
  if [[ "$expected" -eq 0 ]]; then
    say "slice $name has no workers ($said)"
    return "$EXIT_WORKER_LOST"
  fi
}

# ---- The workers.

# on SECONDS WORKERS COMMAND: a shell command on workers.
on() {
  call "$1" gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "${ssh_flags[@]}" \
    --worker="$2" --command="$3"
}

remote() { quoted bash retro_jax/launch/worker.sh "$@"; }

# answers SECONDS VERB COMMAND: runs it on all workers; sets `answers` to one RESULT a worker.
# Returns 69 when a worker did not answer.
answers() {
  on "$1" all "$3" >"$scratch/said" 2>&1 || true
  if [[ -n "$DRY_RUN" ]]; then answers=(); return; fi
  mapfile -t answers < <(tr -d '\r' <"$scratch/said" | grep -oE "retro-worker [^ ]+ $2 .*" |
    sort -u -k 2,2 | cut -d ' ' -f 4-)
  if [[ ${#answers[@]} -lt $expected ]]; then
    grep -E 'ERROR|rror:' "$scratch/said" | tail -n 3 >&2 || true
    say "$2: ${#answers[@]} of $expected workers answered"
    return "$EXIT_WORKER_LOST"
  fi
}

make_archive() {
  local tree=HEAD
  if [[ -n "$(git -C "$root" status --porcelain --untracked-files=no)" ]]; then
    if [[ -n "$allow_dirty" ]]; then
      if [[ -z "$DRY_RUN" ]]; then tree="$(git -C "$root" stash create)"; fi
      note "of the changed files: \$(git stash create) for HEAD"
    elif [[ -n "$DRY_RUN" ]]; then
      note 'there are changed files, so this would end here; --allow_dirty installs them too'
    else
      die "$EXIT_BAD_INPUT" "there are changed files, which HEAD does not contain: commit them," \
        "or --allow_dirty installs them too"
    fi
  fi
  call 300 git -C "$root" archive --format=tar.gz --output="$archive" "$tree"
}

install_code() {
  local code=0
  say 'installing on all workers'
  call "$build" gcloud compute tpus tpu-vm scp "$archive" "$name:retro_jax.tar.gz" "${where[@]}" \
    "${ssh_flags[@]}" --worker=all >"$scratch/said" 2>&1 || code=$?
  if [[ $code -ne 0 ]]; then
    tail -n 20 "$scratch/said" >&2
    say "the code could not be copied to all workers; does 'ssh-add -l' list the key that gcloud uses?"
    return "$EXIT_WORKER_LOST"
  fi
  # The environment stays: it is made anew only when the pins changed.
  answers "$build" install 'mkdir -p retro_jax && find retro_jax -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} + && tar -xzf retro_jax.tar.gz -C retro_jax && bash retro_jax/launch/worker.sh install' || code=$?
  all_good install "$code"
}

# all_good VERB CODE: 0, or the code of `answers` with the workers' output shown.
all_good() {
  local code="$2" answer
  for answer in "${answers[@]}"; do
    if [[ "$answer" != 0 && "$answer" != ok ]]; then
      code="$answer"
      if [[ "$code" == busy ]]; then
        code="$EXIT_BAD_INPUT"
        say "$name runs already; 'logs' shows it, 'stop' ends it, 'train' watches it"
      fi
      if [[ $(after "$code") == stop ]]; then break; fi
    fi
  done
  if [[ "$code" -ne 0 ]]; then
    tail -n 60 "$scratch/said" >&2
    say "$1 failed, exit code $code: $(meaning "$code")"
  fi
  return "$code"
}

preflight() {
  local code=0 seconds=120
  say 'preflight on all workers'
  answers "$((reach + seconds))" preflight "$(remote preflight --seconds="$seconds" \
    --port="$port" ${run_dir:+"--run_dir=$run_dir"})" || code=$?
  all_good preflight "$code"
}

start() {
  local code=0
  say "starting: ${training[*]}"
  answers "$reach" start "$(remote start "$name" RETRO_NUM_PROCESSES=auto \
    "RETRO_START_TIMEOUT=$start_timeout" JAX_PLATFORMS=tpu,cpu "${variables[@]}" \
    -- "${training[@]}")" || code=$?
  all_good start "$code" || { code=$?; if [[ $code -ne $EXIT_BAD_INPUT ]]; then end_all; fi; return "$code"; }
}

# Sets `running`, `stopped` (how many) and `ended` ("CODE TIME" each).
look() {
  local code=0 answer
  answers "$reach" state "$(remote state "$name")" || code=$?
  running=0 stopped=0 ended=()
  for answer in "${answers[@]}"; do
    case "$answer" in
      running) running=$((running + 1)) ;;
      exited\ *) ended+=("${answer#exited }") ;;
      stopped\ *) ended+=("${answer#stopped }"); stopped=$((stopped + 1)) ;;
    esac
  done
  return "$code"
}

# Ends what still runs: gently, and `grace` later for good.
end_all() {
  local deadline=$((SECONDS + grace))
  answers "$reach" end "$(remote end "$name")" || true
  while [[ $SECONDS -lt $deadline ]]; do
    look || true
    if [[ $running -eq 0 ]]; then return; fi
    sleep "$poll"
  done
  answers "$reach" kill "$(remote kill "$name")" || true
}

# Until no worker runs; the exit code of the job. Sets `stopped`.
watch_run() {
  local code silent=0 first='' state
  while :; do
    code=0
    look || code=$?
    if [[ $code -eq 0 ]]; then
      silent=0
      if [[ $running -eq 0 ]]; then
        if [[ ${#ended[@]} -eq 0 ]]; then return "$EXIT_WORKER_LOST"; fi  # no trace of a run
        return "$(decide "${ended[@]}")"
      fi
      if [[ ${#ended[@]} -gt 0 ]]; then
        : "${first:=$SECONDS}"
        if [[ $((SECONDS - first)) -ge $grace ]]; then
          say "$running workers run $grace s after another ended; ending them"
          end_all
        fi
      fi
    else
      silent=$((silent + 1))
      state="$(health)"
      if [[ "$state" == gone || "$state" == absent ]]; then
        say 'the slice was taken away'
        return "$EXIT_PREEMPTED"
      fi
      if [[ $silent -ge $patience ]]; then
        [[ "$state" == ready ]] || die "$EXIT_WORKER_LOST" 'no answer from gcloud or the workers;' \
          'the run may go on there: call train again with the same flags to watch it'
        say "a worker has not answered $silent times; ending the others"
        end_all
        return "$EXIT_WORKER_LOST"
      fi
    fi
    sleep "$poll"
  done
}

# The number of the last checkpoint; nothing when it cannot be seen from here.
latest_step() {
  if [[ "$run_dir" != gs://* ]]; then return; fi
  { call "$ask" gcloud storage ls "$run_dir/checkpoints/" 2>/dev/null || true; } |
    { grep -oE '/[0-9]+/?$' || true; } | tr -d / | sort -n | tail -n 1
}

# ---- train.

attempt() {
  running=0 stopped=0
  count_workers || return
  if [[ -z "$DRY_RUN" ]]; then look 2>/dev/null || true; fi
  if [[ $running -gt 0 ]]; then
    say "$name runs already on $running of $expected workers; watching it"
  else
    install_code || return
    preflight || return
    start || return
  fi
  if [[ -n "$DRY_RUN" ]]; then
    note "every $poll s until no worker runs:"
    look
    return
  fi
  say "started; 'launch/tpu_pod.sh logs' shows what it says"
  watch_run
}

finish() {
  if [[ -n "$delete_at_end" ]]; then
    delete_slice
  elif [[ -z "$DRY_RUN" ]]; then
    say "slice $name is still there and costs money; 'delete' ends that"
  fi
  exit "$1"
}

train() {
  local code failures=0 relaunches=0 reached=-1 step
  exec 4>&2  # the trap may come where 2 leads to a file
  trap 'say "no longer watching; the run goes on on its workers: train watches it again, stop ends it" 2>&4; kill "${CALLED:-}" 2>/dev/null || :; exit 130' INT
  make_archive
  while :; do
    ensure_slice
    code=0
    attempt || code=$?
    if [[ -n "$DRY_RUN" ]]; then
      note 'after exit code 69, 75 and, a few times, others: looks for new checkpoints,'
      latest_step >/dev/null
      note 'deletes the slice when it was taken away, and begins again:'
      delete_slice
      finish 0
    fi
    if [[ $stopped -gt 0 ]]; then
      say "stopped as asked, exit code $code: $(meaning "$code")"
      finish "$code"
    fi
    if [[ $(after "$code") =~ ^(done|stop)$ ]]; then
      say "ended with exit code $code: $(meaning "$code")"
      finish "$code"
    fi
    sleep "$settle"
    case "$(health)" in
      gone | absent) code="$EXIT_PREEMPTED" ;;  # whatever its last words were
    esac
    step="$(latest_step)"
    if [[ -n "$step" && "$step" -gt "$reached" ]]; then reached="$step" failures=0 relaunches=0; fi
    relaunches=$((relaunches + 1))
    if [[ $(after "$code") == count ]]; then failures=$((failures + 1)); fi
    if [[ $failures -gt $max_failures || $relaunches -gt $max_relaunches ]]; then
      say "exit code $code: $(meaning "$code"). No new checkpoint in $relaunches tries; giving up"
      finish "$code"
    fi
    say "exit code $code: $(meaning "$code"). Relaunching${step:+ from checkpoint $step}"
    # A slice with a host that stays away is of no use.
    if [[ $code -eq $EXIT_WORKER_LOST && $((relaunches % 2)) -eq 0 ]]; then delete_slice; fi
  done
}

status() {
  local step
  if [[ -n "$DRY_RUN" ]]; then exec >/dev/null; fi  # 3 is where the commands go
  printf 'slice    %s\n' "$(described queued-resources state.state)"
  printf 'node     %s\n' "$(described tpu-vm state)"
  step="$(latest_step)"
  if [[ -n "$run_dir" ]]; then printf 'saved    %s\n' "${step:-no checkpoint in $run_dir}"; fi
  count_workers || return
  look || true
  local codes=("${ended[@]%% *}")
  printf 'workers  %s: %s running%s\n' "$expected" "$running" "${codes:+, ended with ${codes[*]}}"
}

stop() {
  local code=0 deadline=$((SECONDS + grace))
  count_workers || return
  answers "$reach" stop "$(remote stop "$name")" || code=$?
  all_good stop "$code" || return
  while [[ -z "$DRY_RUN" ]] && look && [[ $running -gt 0 ]]; do
    [[ $SECONDS -lt $deadline ]] || die 1 "$running workers still run; 'logs' shows why, 'delete' ends them"
    say "$running of $expected workers are saving"
    sleep "$poll"
  done
  say 'nothing runs'
}

case "$command" in
  create) ensure_slice ;;
  install) make_archive; count_workers && install_code ;;
  preflight) count_workers && preflight ;;
  run) count_workers && start ;;
  logs) on "$([[ -n "$follow" ]] && echo 86400 || echo "$reach")" "$worker" \
          "$(remote logs "$name" "$lines" ${follow:+follow})" ;;
  delete) delete_slice ;;
  *) "$command" ;;
esac
