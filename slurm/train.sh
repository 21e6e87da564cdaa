#!/usr/bin/env bash
# Train on many nodes, one process a GPU; the same command again goes on from the last checkpoint.
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

# shellcheck source=slurm/common.sh
source slurm/common.sh

# One process checks the options, before many start, and says where the run lives.
ranks=$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:-1}))
run=$(WORLD_SIZE=$ranks "$LF_PYTHON" -m trainer "$@" --cfg job --package run --resolve | sed -n "s/^dir: //p")

newest() {
  find "$run/checkpoints" -maxdepth 1 -name "step_*" 2>/dev/null | sort | tail -n 1 | grep . ||
    echo "the start of $run"
}

before=$(newest)
lf_start_at "$before"
lf_rendezvous
code=0
lf_srun --kill-on-bad-exit=1 slurm/rank.sh "$LF_PYTHON" -m trainer "$@" || code=$?

# 1: an error that somebody has to mend, unless the run had come further before it. All else is worth
# another start: 85 stopped early with a checkpoint, as the time limit or a preemption was near,
# 70 crashed, 86 hung, over 128 a signal killed a rank.
after=$(newest)
if [[ $code -gt 1 || ($code -eq 1 && $after != "$before") ]]; then
  lf_requeue "exit code $code at $after"
fi
exit "$code"
