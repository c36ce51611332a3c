#!/usr/bin/env bash
# Trains on Cloud TPU slices; see tpu_vm.py, or --help.
#
#   launch/tpu_vm.sh keep --name=mine --topology=v5p-128 --spot -- python -m dreamllm_jax.train ...
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/tpu_vm.py" "$@"
