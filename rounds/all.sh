#!/usr/bin/env bash
# All rounds on this machine, or on the Ray cluster that cluster.address names. The same command resumes; exit code 75
# says that it was told to stop (SIGTERM, SIGUSR1) and wants to be started again.
#
#   bash rounds/all.sh CONFIG.yaml [key=value ...]
#   bash rounds/all.sh configs/rstar_math/quickstart.yaml run.dir=runs/mine cluster.address=auto cluster.workers=8
set -euo pipefail
. "$(dirname "$0")/launch.sh"
usage_or_go 1 "$@"

exec "$RSTAR" evolve "$@"
