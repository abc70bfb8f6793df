#!/usr/bin/env bash
# Runs the whole recipe on the embedded assistant world, and prints what each stage did. Sets up its own environment.
#
#   scripts/quickstart.sh                 results in runs/quickstart, in this repository
#   scripts/quickstart.sh --seed 1        any flag of the experiment; --help lists them
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
set_up run
keep_memory
cd "$root"
exec "$venv/bin/python" -m experiments.assistant "$@"
