#!/usr/bin/env bash
# Round 1: the bootstrap policy searches without a PPM (8 rollouts); policy-r1 and PPM-r1 are trained from its trees.
# The base's own stage and evaluation (round 0) run first.
# What is finished is skipped; the same command resumes.
#
#   bash rounds/round1.sh CONFIG.yaml [key=value ...]
set -euo pipefail
. "$(dirname "$0")/launch.sh"
usage_or_go 1 "$@"

"$RSTAR" round 0 "$@"
exec "$RSTAR" round 1 "$@"
