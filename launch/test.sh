#!/usr/bin/env bash
# Installs the project, then checks and tests it. Arguments go to pytest: bash launch/test.sh -m "not slow"
set -euo pipefail
chromium=
if ! command -v chromedriver > /dev/null && command -v apt-get > /dev/null && [[ $EUID -eq 0 ]]; then
  echo "== installing chromium, in which the chat page is tested, while pip installs the rest"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update && apt-get install --yes --no-install-recommends chromium chromium-driver; } > /dev/null 2>&1 &
  chromium=$!
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev,quickstart
if [[ -n $chromium ]]; then
  wait "$chromium" || echo "there is no chromium: that test is skipped"
fi

echo "== ruff"
ruff check
ruff format --check

echo "== pytest"
# Files go to the workers in the order of tests/conftest.py. Where a worker crashes the run ends: with another in its place, xdist can wait for ever.
python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 "$@"
