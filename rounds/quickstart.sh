#!/usr/bin/env bash
# Four rounds of rStar-Math on SmolLM2-135M and generated problems, on this machine's CPU. Run it again to resume.
#
#   bash rounds/quickstart.sh [--tiny] [--fresh] [key=value ...]
#
#   --tiny    the same script on a toy model, in a few minutes
#   --fresh   start over instead of resuming
set -euo pipefail
unset CDPATH # cd would print where it went
here="$(cd "$(dirname "$0")" && pwd)/$(basename "$0")"
cd "$(dirname "$here")/.."
. rounds/environment.sh

config=configs/rstar_math/quickstart.yaml
arguments=()
for argument in "$@"; do
    case "$argument" in
    --tiny) config=configs/rstar_math/tiny.yaml ;;
    --fresh) arguments+=(--fresh) ;;
    --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$here"; exit 0 ;;
    -*) echo "rstar: unknown option $argument; need --tiny, --fresh or key=value" >&2; exit 2 ;;
    *) arguments+=("$argument") ;;
    esac
done

make_environment .venv quickstart
exec .venv/bin/rstar evolve "$config" "${arguments[@]}"
