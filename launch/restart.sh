#!/usr/bin/env bash
# Starts a training command again for as long as that helps.  Tested; used by the other files here.
#   launch/restart.sh .venv/bin/python -m dsmoe_jax train --config=configs/dsmoe_16b.py --workdir=runs/a
# By the exit code of the command:
#   0         done
#   2         bad input, or a full disk: the same again would end the same way
#   130, 143  somebody asked it to stop, and it has saved
#   others    a lost process, host, device or bucket: it goes on from its last checkpoint
# At most RESTARTS times (100), RESTART_SECONDS (10) apart.
set -uo pipefail
for ((restart = 0; ; restart++)); do
  "$@"
  code=$?
  case $code in 0 | 2 | 130 | 143) exit "$code" ;; esac
  if ((restart >= ${RESTARTS:-100})); then
    echo "restart.sh: exit code $code after $restart restarts; gave up" >&2
    exit "$code"
  fi
  echo "restart.sh: exit code $code; restart $((restart + 1)) of ${RESTARTS:-100}" >&2
  sleep "${RESTART_SECONDS:-10}"
done
