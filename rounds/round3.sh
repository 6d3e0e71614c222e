#!/usr/bin/env bash
# Round 3: policy-r2 searches, guided by PPM-r2 (16 rollouts).
# What is finished is skipped; the same command resumes.
#
#   bash rounds/round3.sh CONFIG.yaml [key=value ...]
set -euo pipefail
. "$(dirname "$0")/launch.sh"
usage_or_go 1 "$@"

exec "$RSTAR" round 3 "$@"
