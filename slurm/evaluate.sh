#!/usr/bin/env bash
# Evaluate a run's newest checkpoint, or checkpoint.load, as a job of its own, one process a GPU.
#
#   sbatch --dependency=afterok:JOB slurm/evaluate.sh +experiment=laion_512
#
# This starts when the training JOB is done, even if JOB goes back into the queue several times. With
# `--dependency=singleton` instead, evaluations run one after another. Submit from the project's folder.
# Arguments are passed on to `python -m trainer.evaluate`.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --output=slurm/logs/evaluate-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

[[ -f slurm/common.sh ]] || { echo "error: submit from the project's folder, not from $PWD" >&2; exit 1; }
# shellcheck source=slurm/common.sh
source slurm/common.sh
lf_rendezvous
lf_srun --kill-on-bad-exit=1 slurm/rank.sh "$LF_PYTHON" -m trainer.evaluate "$@"
