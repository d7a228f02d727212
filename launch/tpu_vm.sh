#!/usr/bin/env bash
# A TPU pod slice of Cloud TPU VMs: the same command on all its hosts.  Not run by us: docs/pods.md.
#   launch/tpu_vm.sh NAME ZONE --config=configs/dsmoe_16b.py --workdir=/mnt/shared/run ...
# Before: the repository with its .venv (extra `tpu`) on every host, and /mnt/shared mounted on all.
set -euo pipefail
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="\
cd dsmoe_jax && exec .venv/bin/python -m dsmoe_jax train --distributed $(printf '%q ' "$@")"
