#!/usr/bin/env bash
# Round 2: policy-r1 searches, terminal-guided (16 rollouts); the first PPM that is reliable comes out of it.
# What is finished is skipped; the same command resumes.
#
#   bash rounds/round2.sh CONFIG.yaml [key=value ...]
set -euo pipefail
. "$(dirname "$0")/launch.sh"
usage_or_go 1 "$@"

exec "$RSTAR" round 2 "$@"
