#!/usr/bin/env bash
# Round 4: policy-r3 and PPM-r3 search; problems still unsolved get up to 64, then up to 128 rollouts more.
# What is finished is skipped; the same command resumes.
#
#   bash rounds/round4.sh CONFIG.yaml [key=value ...]
set -euo pipefail
. "$(dirname "$0")/launch.sh"
usage_or_go 1 "$@"

exec "$RSTAR" round 4 "$@"
