#!/usr/bin/env bash
# Encode image shards to latents as a job array, one process a GPU: any of them may be killed at any
# moment, and its array task goes back into the queue.
#
#   sbatch --array=0-31 slurm/precompute.sh +experiment=laion_512
#
# Submit from the project's folder. The process that finds all shards encoded writes the manifest.
#SBATCH --job-name=precompute
#SBATCH --nodes=1
#SBATCH --output=slurm/logs/precompute-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
set -euo pipefail

# shellcheck source=slurm/common.sh
source slurm/common.sh
processes=${SLURM_GPUS_ON_NODE:-1}
index=$(((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:?submit with --array=0-N}) / SLURM_ARRAY_TASK_STEP))

# Slurm's warning before the time limit comes to this script alone; finished shards stay finished.
trap 'lf_requeue "the time limit or a preemption is near"' USR1

code=0
# shellcheck disable=SC2016 # expanded by each process
lf_srun ${SLURM_GPUS_ON_NODE:+--gpus-per-task=1} slurm/rank.sh \
  bash -c 'exec "$@" precompute.task="$(($0 + SLURM_PROCID))"' "$((index * processes))" \
  "$LF_PYTHON" -m trainer.precompute "$@" \
  precompute.num_tasks="$((SLURM_ARRAY_TASK_COUNT * processes))" &
wait $! || code=$?

# A signal killed a process: once more, though it may come again, such as SIGKILL for want of memory.
if [[ $code -gt 128 && ${SLURM_RESTART_COUNT:-0} -lt $LF_STALLED_STARTS ]]; then
  lf_requeue "exit code $code"
fi
exit "$code"
