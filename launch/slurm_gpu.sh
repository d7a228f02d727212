#!/usr/bin/env bash
# GPUs under Slurm, one process a GPU.  Not run by us: docs/pods.md.
#   sbatch --nodes=8 launch/slurm_gpu.sh --config=configs/dsmoe_16b.py --workdir=/shared/run ...
# with the flags that `plan --chip=h100 --chips=64 --config.mesh.slices=8` proposes: between servers
# `data` alone.  A process that is lost ends all others, and they start again in the same allocation.
# Before: the repository with its .venv (extra `cuda`) on a file system that all nodes share.
#SBATCH --job-name=dsmoe
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail
exec launch/restart.sh srun --kill-on-bad-exit=1 .venv/bin/python -m dsmoe_jax train "$@"
