#!/usr/bin/env bash
# Encode image shards to latents as a job array, one process a GPU. A process may be killed at any
# moment: its array task goes back into the queue, and finished shards stay finished.
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

[[ -f slurm/common.sh ]] || { echo "error: submit from the project's folder, not from $PWD" >&2; exit 1; }
# shellcheck source=slurm/common.sh
source slurm/common.sh
processes=${SLURM_GPUS_ON_NODE:-1}
index=$(((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:?submit with --array=0-N}) / SLURM_ARRAY_TASK_STEP))

# Slurm sends its warning before the time limit only to this script (B: in --signal).
trap 'lf_requeue "the time limit or a preemption is near"' USR1

code=0
export LF_FIRST_TASK=$((index * processes))
lf_srun ${SLURM_GPUS_ON_NODE:+--gpus-per-task=1} slurm/rank.sh \
  "$LF_PYTHON" -m trainer.precompute "$@" \
  precompute.num_tasks="$((SLURM_ARRAY_TASK_COUNT * processes))" \
  "precompute.task=\${oc.env:LF_TASK}" &
wait $! || code=$?

# After a signal, start again, but only a few times: a lack of memory can kill each start.
if [[ $code -gt 128 && ${SLURM_RESTART_COUNT:-0} -lt $LF_STALLED_STARTS ]]; then
  lf_requeue "exit code $code ($(lf_meaning "$code"))"
fi
exit "$code"
