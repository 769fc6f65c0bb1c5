#!/usr/bin/env bash
# A training run on TPUs of a GKE cluster, by xpk; the cluster is there already.
#
# usage: launch/gke.sh COMMAND [FLAG ...] [-- MODULE [ARGUMENT ...]]
#   e.g. launch/gke.sh create --name retro-1 --cluster my-cluster --type v5litepod-16 \
#            --zone us-west4-a --project my-project --bucket gs://my-bucket/runs \
#            -- retro_jax.train --gin_file=... --gin.NAME=VALUE
#
#   create   submits the run; GKE restarts it after preemption, lost workers and kills
#   status   of the workload
#   wait     until it has ended; exit code 0 when it succeeded, 125 when it did not, 124 when not yet
#   logs     of its workers: --lines N (100) of each, --follow
#   delete   the workload; SIGTERM first, so that it saves
#
# Flags, each also as a variable (--zone is RETRO_ZONE):
#   --name NAME        of workload and run; required, as are --cluster, --zone, --project and, to
#                      create, --type
#   --type TYPE        TPU type, e.g. v5litepod-16
#   --image IMAGE      used as it is: retro_jax and its packages are in it, `python` is theirs
#   --base_image IMAGE xpk adds this checkout to it, and each worker installs the packages (python:3.11)
#   --bucket gs://...  run folder is BUCKET/NAME unless the command has --gin.RUN_DIR
#   --max_restarts N   (50)
#   --priority LEVEL   very-low to very-high (medium)
# Without a variable:
#   --spot, --on-demand, --reservation NAME   for clusters that provision by themselves
#   --env NAME=VALUE           for the training command; may be repeated
#   --create_flag=FLAG         passed on to xpk workload create; may be repeated
#   --dry_run                  prints the commands and runs none
#
# Needs xpk with --restart-on-exit-codes, gcloud and kubectl. Exit codes: 2 for bad input, else
# those of xpk and kubectl.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

case "${1:-}" in
  create | status | wait | logs | delete) command="$1"; shift ;;
  --help | -h) usage; exit 0 ;;
  '') usage >&2; exit "$EXIT_BAD_INPUT" ;;
  *) bad "unknown command '$1'; expected create, status, wait, logs or delete" ;;
esac

name="${RETRO_NAME:-}" type="${RETRO_TYPE:-}" zone="${RETRO_ZONE:-}" project="${RETRO_PROJECT:-}"
cluster="${RETRO_CLUSTER:-}" image="${RETRO_IMAGE:-}" bucket="${RETRO_BUCKET:-}"
base_image="${RETRO_BASE_IMAGE:-python:3.11}" max_restarts="${RETRO_MAX_RESTARTS:-50}"
priority="${RETRO_PRIORITY:-medium}"
payment=() variables=('RETRO_NUM_PROCESSES=auto' "RETRO_START_TIMEOUT=${RETRO_START_TIMEOUT:-300}"
  'JAX_PLATFORMS=tpu,cpu')
create_flags=() lines=100 follow='' training=()
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
    --cluster) cluster="$(value "$@")"; shift 2 ;;
    --image) image="$(value "$@")"; shift 2 ;;
    --base_image) base_image="$(value "$@")"; shift 2 ;;
    --bucket) bucket="$(value "$@")"; shift 2 ;;
    --max_restarts) max_restarts="$(value "$@")"; shift 2 ;;
    --priority) priority="$(value "$@")"; shift 2 ;;
    --lines) lines="$(value "$@")"; shift 2 ;;
    --create_flag) create_flags+=("$(value "$@")"); shift 2 ;;
    --reservation) payment=("--reservation=$(value "$@")"); shift 2 ;;
    --env=*) variables+=("${1#--env=}"); shift ;;
    --env) variables+=("$(value "$@")"); shift 2 ;;
    --follow) follow=1; shift ;;
    --spot | --on-demand) payment=("$1"); shift ;;
    --dry_run | --dry-run) DRY_RUN=1; shift ;;
    --help | -h) usage; exit 0 ;;
    --) shift; training=("$@"); break ;;
    *) bad "unknown argument '$argument'" ;;
  esac
done

for flag in name cluster zone project; do
  [[ -n "${!flag}" ]] || bad "--$flag is required (or RETRO_${flag^^})"
done
check_run "$name" "$bucket" "${variables[@]}"
number --max_restarts "$max_restarts"; number --lines "$lines"
if [[ "$command" == create ]]; then
  [[ -n "$type" ]] || bad '--type is required (or RETRO_TYPE), e.g. v5litepod-16'
  check_module "${training[@]}"
  [[ "${training[*]}" != *$'\n'* ]] || bad 'an argument of the training command has a line end'
elif [[ ${#training[@]} -gt 0 ]]; then
  bad "$command takes no training command"
fi

root="$(cd "$(dirname "$0")/.." && pwd)"
ask="${RETRO_ASK_SECONDS:-300}"          # for an answer; xpk looks at the cluster first
build="${RETRO_INSTALL_SECONDS:-3600}"   # to build and upload an image
where=(--cluster="$cluster" --zone="$zone" --project="$project")
if [[ -z "$DRY_RUN" ]]; then
  for program in xpk gcloud kubectl; do
    command -v "$program" >/dev/null || bad "$program: not found; install it (pip install xpk; gcloud" \
      "components install kubectl gke-gcloud-auth-plugin)"
  done
fi

create() {
  local run_dir python=python work='' flags=() variable
  run_dir="$(setting RUN_DIR "${training[@]}")"
  if [[ -z "$run_dir" && -n "$bucket" ]]; then
    run_dir="${bucket%/}/$name"
    training+=("--gin.RUN_DIR=$run_dir")
  fi
  if [[ -n "$image" ]]; then
    flags=(--docker-image="$image")
  else
    flags=(--base-docker-image="$base_image" --script-dir="$root")
    python=.venv/bin/python
    work='make environment EXTRAS=tpu && '
  fi
  # xpk sends SIGTERM to the shell that runs this: exec makes that the trainer.
  work+="$(quoted "$python" -m retro_jax.preflight --tpu ${run_dir:+"--run_dir=$run_dir"})"
  work+=" && exec $(quoted "$python" -u -m "${training[@]}")"
  for variable in "${variables[@]}"; do flags+=(--env="$variable"); done
  # xpk restarts after exit codes 42 and 127 to 255 by itself, and never after others.
  call "$build" xpk workload create --workload="$name" "${where[@]}" --tpu-type="$type" \
    --num-slices=1 "${payment[@]}" --priority="$priority" --max-restarts="$max_restarts" \
    --restart-on-exit-codes="$EXIT_WORKER_LOST,$EXIT_PREEMPTED" \
    --termination-grace-period-seconds="${RETRO_GRACE_SECONDS:-300}" \
    "${flags[@]}" "${create_flags[@]}" --command="$work"
}

case "$command" in
  create) create ;;
  status) call "$ask" xpk workload list "${where[@]}" --filter-by-job="$name" ;;
  wait)
    seconds="${RETRO_WAIT:-86400}"
    call "$((seconds + ask))" xpk workload list "${where[@]}" --wait-for-job-completion="$name" \
      --timeout="$seconds" ;;
  logs)
    call "$ask" gcloud container clusters get-credentials "$cluster" --location="${zone%-[a-z]}" \
      --project="$project"
    call "$([[ -n "$follow" ]] && echo 86400 || echo "$ask")" kubectl logs \
      --selector="jobset.sigs.k8s.io/jobset-name=$name" --container=jax-tpu --prefix \
      --max-log-requests=1000 --tail="$lines" ${follow:+--follow} ;;
  delete) call "$ask" xpk workload delete --workload="$name" "${where[@]}" --force ;;
esac
