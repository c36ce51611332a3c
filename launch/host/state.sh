#!/usr/bin/env bash
# Tells the state of this host's run in one line:
#
#   dreamllm_jax host=NAME state=absent|running|finished|stopped|failed status=N restarts=N said=THE LAST LINE OF ITS LOG
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

declare -A unit=([ActiveState]=inactive [SubState]=dead [ExecMainStatus]=0 [NRestarts]=0)
while IFS='=' read -r name value; do
  unit[$name]="$value"
done < <(systemctl show dreamllm --property=ActiveState,SubState,ExecMainStatus,NRestarts)

case "${unit[ActiveState]}/${unit[SubState]} ${unit[ExecMainStatus]}" in
  active/exited*) state=finished ;;
  inactive*) # by hand before it could save, or never started since the host was booted: systemd forgets the difference
    if [[ -e "${MARK:-/run/dreamllm.started}" ]]; then state=stopped; else state=absent; fi
    ;;
  failed*75 | failed*76) state=stopped ;; # by hand, or it would have been started again
  failed*) state=failed ;;
  *) state=running ;; # also while it waits to be started again
esac
printf 'dreamllm_jax host=%s state=%s status=%s restarts=%s said=%s\n' "$(hostname)" "$state" \
  "${unit[ExecMainStatus]}" "${unit[NRestarts]}" "$(tail -n 1 run.log 2> /dev/null || true)"
