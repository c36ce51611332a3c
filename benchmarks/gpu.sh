#!/usr/bin/env bash
# Times the joint step of this project and of PyTorch, one after the other, on the GPU at hand; one JSON line each.
#   bash benchmarks/gpu.sh --size=1b --rows=4
# It needs `pip install -e '.[cuda]'`, and for PyTorch's side torch, transformers and diffusers.
set -euo pipefail
cd "$(dirname "$0")/.."
XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}" python3 -m benchmarks.joint_step "$@"
# The card's memory is PyTorch's here: JAX only counts FLOPs.
JAX_PLATFORMS=cpu python3 -m benchmarks.joint_step_torch "$@"
