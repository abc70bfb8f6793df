#!/usr/bin/env bash
# Cloud TPU: requests a slice, installs this repository on all its workers, and runs experiments there.
#
#   scripts/tpu.sh create                      request the slice and wait until it is ready
#   scripts/tpu.sh install                     copy this code to every worker
#   scripts/tpu.sh run EXPERIMENT [FLAGS]      start an experiment on every worker, in the background
#   scripts/tpu.sh log [WORKER]                follow the log of worker 0, or of another worker
#   scripts/tpu.sh stop                        make the experiment save and exit
#   scripts/tpu.sh resume EXPERIMENT [FLAGS]   continue it, on a new slice if the old one was taken away
#   scripts/tpu.sh fetch gs://FROM DIRECTORY   copy results out of a bucket
#   scripts/tpu.sh delete                      delete the slice, which ends the costs
#
# Before the subcommand: --dry-run prints the commands and runs none; --spot requests cheaper capacity, which may be
# taken away. Environment variables describe the slice:
#
#   TPU_NAME      what to call it
#   TPU_ZONE      where: us-east5-b
#   TPU_TYPE      which and how large: v5litepod-16, v5p-32, v6e-8 (for create and resume)
#   TPU_PROJECT   the project that is billed; if unset, gcloud's default
#   TPU_RUNTIME   the system on the workers; if unset, the standard one for TPU_TYPE
#
# docs/tpu.md explains every step.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

INTERVAL=${TPU_INTERVAL:-30} # seconds between two checks of the request

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }

# Prints the arguments as one line that a shell parses into the same arguments.
quote() {
    local word line=''
    for word in "$@"; do
        case $word in
            '' | *[!A-Za-z0-9_./:=@%+,-]*) word="'${word//\'/\'\\\'\'}'" ;;
        esac
        line+="${line:+ }$word"
    done
    printf '%s\n' "$line"
}

# Runs a command; in a dry run, prints it.
do_() {
    if [[ $dry ]]; then quote "$@"; else "$@"; fi
}

need() {
    local name
    for name in "$@"; do
        [[ ${!name:-} ]] || fail "$name is not set: it should be $(sed -n "s/^#   $name  *//p" "${BASH_SOURCE[0]}" | head -1)"
    done
}

runtime() {
    case ${TPU_RUNTIME:-}/$TPU_TYPE in
        ?*/*) echo "$TPU_RUNTIME" ;;
        /v6e-*) echo v2-alpha-tpuv6e ;;
        /v5p-*) echo v2-alpha-tpuv5 ;;
        /v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        /v[234]-*) echo tpu-ubuntu2204-base ;;
        *) fail "TPU_TYPE=$TPU_TYPE is not known: expected v2-, v3-, v4-, v5litepod-, v5p- or v6e- and a number; if it is correct, set TPU_RUNTIME" ;;
    esac
}

# Runs command $2 of gcloud's group $1 on the slice, with further arguments.
slice() {
    local group=$1 command=$2
    shift 2
    do_ gcloud compute tpus "$group" "$command" "$TPU_NAME" "${place[@]}" "$@"
}

on_workers() { slice tpu-vm ssh --worker="$1" --command="$2"; }

# The state of the request for the slice: ABSENT, or one of Google's, such as WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED.
state() {
    local errors
    errors=$(mktemp)
    if slice queued-resources describe --format='value(state.state)' 2>"$errors"; then
        rm "$errors"
    elif grep -qi 'not.found' "$errors"; then
        rm "$errors"
        echo ABSENT
    else
        fail "the state of $TPU_NAME cannot be read: $(tail -n 1 "$errors")"
    fi
}

create() {
    local version
    need TPU_TYPE
    version=$(runtime)
    slice queued-resources create --node-id="$TPU_NAME" --accelerator-type="$TPU_TYPE" --runtime-version="$version" \
        ${spot[@]+"${spot[@]}"}
    await
}

await() {
    local now last=''
    if [[ $dry ]]; then
        slice queued-resources describe --format='value(state.state)'
        return
    fi
    while now=$(state) && [[ $now != ACTIVE ]]; do
        case $now in
            FAILED | SUSPENDING | SUSPENDED | DELETING | ABSENT)
                fail "the request for $TPU_NAME is $now: see 'gcloud compute tpus queued-resources describe $TPU_NAME" \
                    "$(quote "${place[@]}")', then scripts/tpu.sh delete, and create it again"
                ;;
        esac
        if [[ $now != "$last" ]]; then echo "$TPU_NAME: $now" >&2; fi
        last=$now
        sleep "$INTERVAL"
    done
    [[ $now == ACTIVE ]]
    echo "$TPU_NAME: ACTIVE" >&2
}

install() {
    local archive
    archive=${TMPDIR:-/tmp}/rlhf_jax.tar.gz
    do_ tar -czf "$archive" -C "$root" --exclude=__pycache__ setup.cfg pyproject.toml README.md rlhf_jax experiments scripts
    do_ gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:rlhf_jax.tar.gz" "${place[@]}" --worker=all
    on_workers all 'rm -rf rlhf_jax && mkdir rlhf_jax && tar -xzf rlhf_jax.tar.gz -C rlhf_jax && bash rlhf_jax/scripts/tpu_worker.sh install'
}

run() {
    (($#)) || fail "which experiment? For example: scripts/tpu.sh run ppo --out gs://BUCKET/ppo"
    local name=${1#experiments.}
    [[ -f $root/experiments/${name//.//}.py ]] || fail "there is no experiments/$name.py"
    shift
    on_workers all "bash rlhf_jax/scripts/tpu_worker.sh start $(quote "experiments.$name" "$@")"
}

resume() {
    local now=SUSPENDED
    (($#)) || fail "which experiment? Name it, with the flags of its first run"
    need TPU_TYPE
    if [[ $dry ]]; then
        echo "# the commands after a preemption; a slice that still exists is not recreated" >&2
        slice queued-resources describe --format='value(state.state)'
    else
        now=$(state)
    fi
    case $now in
        ACTIVE) ;;
        FAILED | SUSPENDING | SUSPENDED)
            delete
            create
            install
            ;;
        ABSENT)
            create
            install
            ;;
        *)
            await
            install
            ;;
    esac
    run "$@"
}

delete() { slice queued-resources delete --force --quiet; }

fetch() {
    [[ $# == 2 && $1 == gs://?* ]] || fail "from where, and to where? For example: scripts/tpu.sh fetch gs://BUCKET/ppo runs/ppo"
    do_ mkdir -p "$2"
    do_ gcloud storage rsync --recursive "$1" "$2"
}

dry='' spot=()
while [[ ${1:-} == -* ]]; do
    case $1 in
        --dry-run) dry=yes ;;
        --spot) spot=(--spot) ;;
        -h | --help)
            usage
            exit
            ;;
        *) fail "unknown flag $1; an experiment's flags follow its name; --help lists the others" ;;
    esac
    shift
done
subcommand=${1:-}
case $subcommand in
    create | install | run | log | stop | resume | fetch | delete) shift ;;
    '') fail "no subcommand; --help lists them" ;;
    *) fail "unknown subcommand $subcommand; --help lists them" ;;
esac
if [[ ! $dry ]] && ! command -v gcloud >/dev/null; then
    fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
fi
if [[ $subcommand != fetch ]]; then
    need TPU_NAME TPU_ZONE
    place=(--zone="$TPU_ZONE" ${TPU_PROJECT:+--project="$TPU_PROJECT"})
fi
case $subcommand in
    log) on_workers "${1:-0}" 'tail -n 100 -F rlhf_jax.log' ;;
    stop) on_workers all 'bash rlhf_jax/scripts/tpu_worker.sh stop' ;;
    *) "$subcommand" "$@" ;;
esac
