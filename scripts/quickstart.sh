#!/usr/bin/env bash
# Runs the whole recipe on the embedded assistant world and prints a table of the stages. Creates its own environment.
#
#   scripts/quickstart.sh                 results go to runs/quickstart in this repository
#   scripts/quickstart.sh --seed 1        any flag of the experiment; --help lists them
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
set_up run
keep_memory
cd "$root"
exec "$venv/bin/python" -m experiments.assistant "$@"
