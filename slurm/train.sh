#!/usr/bin/env bash
# Train on many nodes, one process a GPU; the same command again resumes from the newest checkpoint.
#
#   sbatch --nodes=4 slurm/train.sh +experiment=laion_512 optim.lr=1e-4
#
# Submit from the project's folder. Arguments are passed on to `python -m trainer`.
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --output=slurm/logs/train-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@180
set -euo pipefail

[[ -f slurm/common.sh ]] || { echo "error: submit from the project's folder, not from $PWD" >&2; exit 1; }
# shellcheck source=slurm/common.sh
source slurm/common.sh

# One process checks the options before many start. Python alone reads the run folder out of them.
ranks=$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:-1}))
options=$(WORLD_SIZE=$ranks "$LF_PYTHON" -m trainer "$@" --cfg job --package run --resolve)

before=$("$LF_PYTHON" -m trainer.runs.progress <<<"$options")
lf_start_at "$before"
lf_rendezvous
code=0
lf_srun --kill-on-bad-exit=1 slurm/rank.sh "$LF_PYTHON" -m trainer "$@" || code=$?

# After code 1, an error that a person has to fix, the job starts again only if this start saved a new
# checkpoint. After every higher code it starts again.
after=$("$LF_PYTHON" -m trainer.runs.progress <<<"$options")
if [[ $code -gt 1 || ($code -eq 1 && $after != "$before") ]]; then
  lf_requeue "exit code $code ($(lf_meaning "$code")) at $after"
fi
exit "$code"
