#!/usr/bin/env bash
# Serves the pages on which people rank, rate, compare and write answers, and prints one link for the administrator.
# Creates its own environment.
#
#   scripts/people.sh                                     the quickstart's model answers the world's prompts
#   scripts/people.sh --responses answers.jsonl           {"prompt", "responses": [K]} a line; needs no model
#   scripts/people.sh --chat URL                          people talk to the models of an OpenAI-compatible server
#   scripts/people.sh export --db PATH --out FILE.jsonl   writes what people answered
#   scripts/people.sh import --db PATH --responses FILE   adds tasks to a store, also while it is served
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
set_up people
cd "$root"
exec "$venv/bin/python" -m rlhf_jax.people "$@"
