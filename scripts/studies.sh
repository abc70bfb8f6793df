#!/usr/bin/env bash
# Runs every study, four seeds each, two at a time, and renews the tables and plots in docs/. Sets up its own environment.
#
#   scripts/studies.sh                    results in runs/studies; run it again to go on where it was stopped
#   scripts/studies.sh --docs None        any flag that all studies have; this one leaves docs/ alone
#   scripts/studies.sh --jobs 1           on an accelerator, which seeds cannot share
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
set_up run
keep_memory
cd "$root"
for study in overoptimization frontier ptx; do
    "$venv/bin/python" -m "experiments.studies.$study" --jobs 2 "$@"
done
