#!/usr/bin/env bash
# Starts a command as the run of this host; as root: bash start.sh python -m dreamllm_jax.train ...
set -Eeuo pipefail
trap 'echo "error: host $(hostname): start failed at: $BASH_COMMAND" >&2' ERR
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ "$(bash launch/host/state.sh)" == *" state=running "* ]]; then
  echo "error: host $(hostname): a run is in progress there; stop it first" >&2
  exit 1
fi
printf 'exec %s\n' "${*@Q}" > command.sh
touch "${MARK:-/run/dreamllm.started}" # which a boot removes
systemctl restart dreamllm
