#!/usr/bin/env bash
# Makes a host of a TPU slice ready to train; as root, in the unpacked checkout (/opt/dreamllm_jax).
set -Eeuo pipefail
trap 'echo "error: host $(hostname): setup failed at: $BASH_COMMAND" >&2' ERR
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

bash launch/host/environment.sh

# Without them TPUs from v5e on start and end slowly, as JAX warns.
echo always > "${HUGEPAGES:-/sys/kernel/mm/transparent_hugepage/enabled}"

cp launch/host/dreamllm.service "${UNITS:-/etc/systemd/system}/"
systemctl daemon-reload
echo "host $(hostname): ready"
