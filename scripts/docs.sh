#!/usr/bin/env bash
# Builds the site from docs/ into build/site, with warnings as errors. Creates its own environment on the first call.
#
#   scripts/docs.sh                   build/site/index.html, which opens from disk
#   scripts/docs.sh -E                all pages afresh; arguments go to Sphinx
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$root"
set_up docs
export JAX_PLATFORMS=cpu
"$venv/bin/python" -m sphinx -q -W --keep-going -b html -d build/site.cache "$@" docs build/site
echo "build/site/index.html"
