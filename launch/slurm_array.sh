#!/usr/bin/env bash
# An experiment under Slurm, one run a task of an array.  Not run by us: docs/pods.md.
#   sbatch --array=0-14 launch/slurm_array.sh experiments.v1.table1 --scale=gpu --seeds=3 \
#     --results=/shared/runs
# 0-14 are 5 arms x 3 seeds.  The report is written by every task from the runs that are finished;
# so the last one to end writes the whole one.  Tasks that were lost: submit the same again.
#SBATCH --job-name=dsmoe
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail
module=$1
shift
srun .venv/bin/python -m "$module" --cell="$SLURM_ARRAY_TASK_ID" "$@"
