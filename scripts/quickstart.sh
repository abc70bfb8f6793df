#!/usr/bin/env bash
# Runs the whole recipe on the embedded assistant world, and prints what each stage did. Sets up its own environment.
#
#   scripts/quickstart.sh                 results in runs/quickstart, in this repository
#   scripts/quickstart.sh --seed 1        any flag of the experiment; --help lists them
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
set_up run
cd "$root"
# On a CPU, XLA allocates and frees each step's buffers: let the allocator keep them, in huge pages (a fifth faster).
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec "$venv/bin/python" -m experiments.assistant "$@"
