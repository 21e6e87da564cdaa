#!/usr/bin/env bash
# Encode image shards to latents as a job array: a task may be killed at any moment, and goes back
# into the queue.
#
#   sbatch --array=0-31 slurm/precompute.sh +experiment=laion_512
#
# Submit from the project's folder. The task that finds all shards encoded writes the manifest.
#SBATCH --job-name=precompute
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --output=runs/precompute-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@60
set -euo pipefail

# shellcheck source=slurm/cluster.env
source slurm/cluster.env
lf_setup

code=0
srun "$LF_PYTHON" -m trainer.precompute "$@" \
  precompute.task="$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))" \
  precompute.num_tasks="$SLURM_ARRAY_TASK_COUNT" || code=$?

# 138: killed by USR1, Slurm's warning before the time limit; finished shards stay finished.
# Another signal may come again each time, such as SIGKILL for want of memory.
if [[ $code -eq 138 || ($code -gt 128 && ${SLURM_RESTART_COUNT:-0} -lt 3) ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
