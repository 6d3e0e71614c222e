#!/usr/bin/env bash
# Starts a Ray head on this machine; other machines join with rounds/ray/join.sh, rounds/ray/submit.sh runs the rounds.
#
#   bash rounds/ray/head.sh [options of `ray start`]
#
# RSTAR_RAY_PORT  port of the head (default 6379)
set -euo pipefail
. "$(dirname "$0")/../launch.sh"
usage_or_go 0 "$@"

exec ray start --head --port="${RSTAR_RAY_PORT:-6379}" --dashboard-host=127.0.0.1 "$@"
