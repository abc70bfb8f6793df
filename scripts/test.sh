#!/usr/bin/env bash
# Runs every check: lint, format, types, tests. Sets up its own environment, and is quick when that is there.
#
#   scripts/test.sh                       everything
#   scripts/test.sh tests/algorithms/test_ppo.py     the checks, and these tests; any arguments go to pytest
#   scripts/test.sh --fast                only the tests that are not marked slow
#   PYTHON=python3.12 scripts/test.sh     under another interpreter, in an environment of its own
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$root"

fast=
arguments=()
for argument in "$@"; do
    if [[ $argument == --fast ]]; then fast=yes; else arguments+=("$argument"); fi
done

set_up dev
if [[ $fast ]]; then
    arguments=(-m "not slow" ${arguments[@]+"${arguments[@]}"})
else
    "$venv/bin/ruff" check
    "$venv/bin/ruff" format --check
    "$venv/bin/mypy"
fi
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile ${arguments[@]+"${arguments[@]}"}
