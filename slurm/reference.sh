#!/usr/bin/env bash
# Compute the references of an experiment before its training needs them, one process a GPU.
#
#   sbatch slurm/reference.sh +experiment=laion_512
#
# Before a preemption or the time limit the job saves its work and goes back into the queue. Submit from
# the project's folder. Arguments are passed on to `python -m trainer.reference`.
#SBATCH --job-name=reference
#SBATCH --nodes=1
#SBATCH --output=slurm/logs/reference-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@60
set -euo pipefail

[[ -f slurm/common.sh ]] || { echo "error: submit from the project's folder, not from $PWD" >&2; exit 1; }
# shellcheck source=slurm/common.sh
source slurm/common.sh

# The names of the files in the folder of references measure the progress of the job.
options=$("$LF_PYTHON" -m trainer.reference "$@" --cfg job --package eval --resolve)
lf_start_at "$("$LF_PYTHON" -m trainer.runs.progress <<<"$options")"
lf_rendezvous
code=0
lf_srun --kill-on-bad-exit=1 slurm/rank.sh "$LF_PYTHON" -m trainer.reference "$@" || code=$?
if ((code > 1)); then
  lf_requeue "exit code $code ($(lf_meaning "$code"))"
fi
exit "$code"
