#!/usr/bin/env bash
# Several slices of Cloud TPU VMs, one queued resource: the same command on all hosts of all slices.
# Not run by us: docs/pods.md.
#   gcloud compute tpus queued-resources create NAME --zone=ZONE --node-count=2 --node-prefix=NAME \
#     --accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5
#   launch/tpu_vm_multislice.sh NAME ZONE --config=configs/dsmoe_16b.py --workdir=gs://BUCKET/run ...
# with the flags that `plan --chip=v5p --chips=128 --config.mesh.slices=2` proposes.
# Before: the repository with its .venv (extra `tpu`) on every host.
set -euo pipefail
name=$1 zone=$2
shift 2
gcloud compute tpus queued-resources ssh "$name" --zone="$zone" --node=all --worker=all --command="\
cd dsmoe_jax && exec launch/restart.sh .venv/bin/python -m dsmoe_jax train --distributed $(printf '%q ' "$@")"
