#!/usr/bin/env bash
# The part of tpu.sh that runs on each worker. Code is in ~/rlhf_jax, environment in ~/venv, log in ~/rlhf_jax.log.
#
#   tpu_worker.sh install                  create the environment
#   tpu_worker.sh start MODULE [FLAGS]     run a module in the background, in the home directory
#   tpu_worker.sh stop                     make it save and exit
#
# The module is restarted when it exits with 75 ("run me again"), when a signal killed it (or it lost the other hosts
# of its run), and after a restart of the machine. It is not restarted when it has finished, when it exits with another
# error, or after it ended within a minute of its start five times in a row.
set -euo pipefail
cd
job=rlhf_jax.job   # holds the command while it should be running
lock=rlhf_jax.lock # held while it is running; names the process that restarts it
log=rlhf_jax.log

say() { echo "$(date -u +%FT%TZ) $*"; }

loop() {
    local child='' code began early=0 stopped='' words
    exec 9>>"$lock"
    flock --nonblock 9 || return 0 # it is already running
    echo $$ >"$lock"
    trap 'stopped=yes; [[ ! $child ]] || kill -TERM "$child" || true' TERM
    while [[ -f $job && ! $stopped ]]; do
        mapfile -d '' -t words <"$job"
        began=$SECONDS
        say "start: ${words[*]}"
        venv/bin/python -m "${words[@]}" & # inherits the lock
        child=$!
        code=0
        wait "$child" || code=$?
        if [[ $stopped ]]; then # the signal interrupted the wait, not the child
            code=0
            wait "$child" || code=$?
        fi
        child=''
        say "end: exit code $code"
        if [[ $stopped ]]; then return; fi
        if ((SECONDS - began < 60)); then early=$((early + 1)); else early=0; fi
        if ((code != 75 && code < 128)); then
            rm -f "$job"
        elif ((early == 5)); then
            rm -f "$job"
            say "gave up: it ended within a minute of its start five times in a row"
        else
            sleep "${TPU_INTERVAL:-10}" 9>&-
        fi
    done
}

running() { ! flock --nonblock "$lock" true; }

case ${1:-} in
    install)
        [[ -x .local/bin/uv ]] || curl -LsSf https://astral.sh/uv/install.sh | sh
        .local/bin/uv venv --quiet --allow-existing --python 3.12 venv
        .local/bin/uv pip install --quiet --python venv/bin/python --editable 'rlhf_jax[tpu]'
        ;;
    start)
        shift
        if running; then
            if cmp -s "$job" <(printf '%s\0' "$@"); then exit; fi
            echo "error: this worker still runs something else: stop it with scripts/tpu.sh stop" >&2
            exit 2
        fi
        printf '%s\0' "$@" >"$job"
        {
            crontab -l 2>/dev/null | grep -v tpu_worker.sh || true
            echo "@reboot bash rlhf_jax/scripts/tpu_worker.sh loop >>$log 2>&1"
        } | crontab -
        setsid bash "$0" loop >>"$log" 2>&1 </dev/null &
        ;;
    loop) loop ;;
    stop)
        rm -f "$job"
        if running; then
            kill -TERM "$(cat "$lock")"
            flock --timeout 600 "$lock" true
        fi
        ;;
    *)
        echo "error: expected install, start or stop" >&2
        exit 2
        ;;
esac
