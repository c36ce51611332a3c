#!/usr/bin/env bash
# Installs the project, then checks and tests it. Arguments go to pytest: bash launch/test.sh -m "not slow"
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev,quickstart

echo "== ruff"
ruff check
ruff format --check

echo "== pytest"
python -m pytest -q "$@"
