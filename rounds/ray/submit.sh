#!/usr/bin/env bash
# Submits the rounds to the Ray head on this machine, one job a round, and follows them. The jobs run in this folder.
# A finished round is skipped: the same command resumes. `ray job stop ID` stops a round at a safe point.
#
#   bash rounds/ray/submit.sh [--rounds "1 2"] CONFIG.yaml [key=value ...]
#
# --rounds                which rounds, in order (default "0 1 2 3 4": name them where run.rounds is less)
# RAY_DASHBOARD_ADDRESS   the head's dashboard, from ray[default] (default http://127.0.0.1:8265)
set -euo pipefail
if [ "${1:-}" = --decoded ]; then eval "exec $(base64 -d <<<"$2")"; fi # what a job runs: Ray's shell keeps no quotes
. "$(dirname "$0")/../launch.sh"
usage_or_go 1 "$@"

rounds="0 1 2 3 4"
[ "$1" = --rounds ] && rounds="$2" && shift 2
config="$1"
shift
case "$RSTAR" in */*) RSTAR="$(realpath "$RSTAR")" ;; esac
for number in $rounds; do
    job=$(printf '%q ' env --chdir="$PWD" "$RSTAR" round "$number" "$config" cluster.address=auto "$@" | base64 -w0)
    ray job submit --address "${RAY_DASHBOARD_ADDRESS:-http://127.0.0.1:8265}" -- \
        bash "$checkout/rounds/ray/submit.sh" --decoded "$job" || {
        echo "rstar: round $number did not finish; the same command resumes" >&2
        exit 1
    }
done
