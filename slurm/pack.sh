#!/usr/bin/env bash
# Pack raw images, or index tars made elsewhere, as a job on one node that needs CPUs and no GPU.
#
#   sbatch --gpus-per-node=0 --mincpus=32 slurm/pack.sh +experiment=laion_512
#
# Submit from the project's folder. Arguments are passed on to `python -m trainer.pack`, which indexes
# as many tars at a time as the job has CPUs, unless they set data.source.workers.
#SBATCH --job-name=pack
#SBATCH --nodes=1
#SBATCH --mincpus=16
#SBATCH --output=slurm/logs/pack-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

[[ -f slurm/common.sh ]] || { echo "error: submit from the project's folder, not from $PWD" >&2; exit 1; }
# shellcheck source=slurm/common.sh
source slurm/common.sh
exec "$LF_PYTHON" -m trainer.pack data.source.workers="${SLURM_CPUS_ON_NODE:-1}" "$@"
