#!/usr/bin/env bash
# Runs every study with four seeds, two at a time, and updates tables and plots in docs/ and README.md. Creates its own environment.
#
#   scripts/studies.sh                    results go to runs/studies; run it again to resume
#   scripts/studies.sh --docs None        any flag that all studies have; this one leaves the pages unchanged
#   scripts/studies.sh --jobs 1           on an accelerator, which two seeds cannot share
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
set_up run
keep_memory
cd "$root"
for study in quickstart overoptimization frontier ptx virtues instruct; do
    "$venv/bin/python" -m "experiments.studies.$study" --jobs 2 "$@"
done
