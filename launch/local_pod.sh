#!/usr/bin/env bash
# Runs a command as a simulated pod on this machine; see local_pod.py, or --help.
#
#   launch/local_pod.sh --hosts=2 --devices=4 -- python -m dreamllm_jax.train --config=configs/tiny.py --workdir=runs/2
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/local_pod.py" "$@"
