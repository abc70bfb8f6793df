#!/usr/bin/env bash
# Runs every check: lint, format, types, tests. Creates its own environment on the first call.
#
#   scripts/test.sh                       everything
#   scripts/test.sh tests/algorithms/test_ppo.py     all checks, but only these tests; arguments go to pytest
#   scripts/test.sh --fast                no lint or types, and only tests that are not marked slow
#   PYTHON=python3.12 scripts/test.sh     under another interpreter, in its own environment
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
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder ${arguments[@]+"${arguments[@]}"}
