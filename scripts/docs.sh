#!/usr/bin/env bash
# Builds the site from docs/ into build/site, with warnings as errors. Creates its own environment on the first call.
#
#   scripts/docs.sh                   the pages, to open from disk: build/site/index.html
#   scripts/docs.sh --check           the same, and then looks for dead links inside the site
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$root"
set_up docs
export JAX_PLATFORMS=cpu
exec "$venv/bin/python" scripts/site.py "$@"
