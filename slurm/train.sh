#!/usr/bin/env bash
# Train on many nodes, one task a GPU; the same command again goes on from the last checkpoint.
#
#   sbatch --nodes=4 slurm/train.sh +experiment=laion_512 optim.lr=1e-4
#
# Submit from the project's folder. Arguments are passed on to `python -m trainer`.
#SBATCH --job-name=latent-foundry
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --output=runs/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@180
set -euo pipefail

# shellcheck source=slurm/cluster.env
source slurm/cluster.env
lf_setup

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# Before Python has installed its handler, Slurm's warning must not kill a rank.
code=0
srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec "$@"' rank \
  "$LF_PYTHON" -m trainer "$@" || code=$?

# 85: stopped early with a checkpoint, because the time limit or a preemption was near.
if [[ $code -eq 85 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
