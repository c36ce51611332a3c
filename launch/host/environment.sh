#!/usr/bin/env bash
# Makes venv/ in the checkout, with this project for TPUs.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# The images of TPU VMs bring Python 3.10; uv brings another without touching theirs.
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --disable-pip-version-check uv
python3 -m uv venv --quiet --allow-existing --python=3.12 venv
python3 -m uv pip install --quiet --python=venv/bin/python ".[tpu]"
