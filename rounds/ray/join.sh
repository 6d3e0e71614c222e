#!/usr/bin/env bash
# Joins this machine to a Ray head, and leaves with Ctrl-C: what its search workers held is searched elsewhere.
#
#   bash rounds/ray/join.sh HEAD:PORT [options of `ray start`]
set -euo pipefail
. "$(dirname "$0")/../launch.sh"
usage_or_go 1 "$@"

address="$1"
shift
exec ray start --address="$address" --block "$@"
