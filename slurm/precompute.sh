#!/usr/bin/env bash
# Encode image shards to latents as a job array: any task may die and be run again.
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
set -euo pipefail

# shellcheck source=slurm/cluster.env
source slurm/cluster.env
lf_setup

srun "$LF_PYTHON" -m trainer.precompute "$@" \
  precompute.task="$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))" \
  precompute.num_tasks="$SLURM_ARRAY_TASK_COUNT"
