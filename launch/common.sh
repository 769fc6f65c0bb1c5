# shellcheck shell=bash
# What the launchers share: messages, usage, time-outs, --dry_run; sourced, runs nothing by itself.

# shellcheck source=launch/exit_codes.sh
source "$(dirname "${BASH_SOURCE[0]}")/exit_codes.sh"

DRY_RUN='' CALLED=''
exec 3>&1  # where --dry_run prints, also from within $(...)

say() { printf '%s: %s\n' "$(basename "$0" .sh)" "$*" >&2; }

# die CODE MESSAGE
die() { local code="$1"; shift; printf 'error: %s\n' "$*" >&2; exit "$code"; }

bad() { die "$EXIT_BAD_INPUT" "$* (--help shows the usage)"; }

# The comment at the top of the script is its usage text.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# value FLAG [VALUE]: fails when the flag has none.
value() { [[ $# -ge 2 && -n "$2" ]] || bad "$1 needs a value"; printf '%s' "$2"; }

number() { [[ "$2" =~ ^[0-9]+$ ]] || bad "$1 is '$2', expected a whole number"; }

# check_run NAME BUCKET [VARIABLE ...]: the flags that the pod launchers have in common.
check_run() {
  local name="$1" bucket="$2" variable
  shift 2
  # Clouds' rule for names of machines; no name can be mistaken for a flag.
  [[ "$name" =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ && ${#name} -le 40 ]] ||
    bad "--name is '$name', expected at most 40 lower-case letters, digits and hyphens"
  [[ -z "$bucket" || "$bucket" == gs://* ]] || bad "--bucket is '$bucket', expected gs://..."
  for variable in "$@"; do
    [[ "$variable" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || bad "--env is '$variable', expected NAME=VALUE"
  done
}

# cpu_environment DEVICES: sets CPU_ENVIRONMENT for a process with so many fake CPU devices.
# The number asked for comes last and so wins over one in XLA_FLAGS.
cpu_environment() {
  # shellcheck disable=SC2034  # used by the scripts that source this
  CPU_ENVIRONMENT=(
    XLA_FLAGS="--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT ${XLA_FLAGS:-} --xla_force_host_platform_device_count=$1"
    JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 OMP_WAIT_POLICY=passive
  )
}

# quoted WORD ...: one line that a shell reads as these words.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

note() { if [[ -n "$DRY_RUN" ]]; then printf '# %s\n' "$*" >&3; fi; }

# call SECONDS COMMAND ...: runs it with a time-out; with --dry_run prints it instead.
call() {
  local seconds="$1" code=0
  shift
  if [[ -n "$DRY_RUN" ]]; then
    printf 'timeout --kill-after=10 %s %s\n' "$seconds" "$(quoted "$@")" >&3
    return 0
  fi
  # In the background, so that a trap of the caller does not wait until the command ends.
  timeout --kill-after=10 "$seconds" "$@" </dev/null &
  CALLED="$!"
  wait "$CALLED" || code=$?
  if [[ $code -eq 124 || $code -eq 137 ]]; then
    say "no answer within $seconds s: $(quoted "$@" | cut -c 1-160)"
  fi
  return "$code"
}

# check_module NAME: a training command begins with a module, as for launch/local_cpu.sh.
check_module() {
  [[ $# -ge 1 && "$1" =~ ^[A-Za-z_][A-Za-z0-9_.]*$ ]] ||
    bad "the training command is '${1:-}', expected a module such as retro_jax.train and its arguments"
}

# setting NAME ARGUMENT ...: the last --gin.NAME=VALUE among the arguments.
setting() {
  local name="$1" argument found=''
  shift
  for argument in "$@"; do
    if [[ "$argument" == "--gin.$name="* ]]; then found="${argument#*=}"; fi
  done
  printf '%s' "$found"
}
