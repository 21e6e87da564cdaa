# shellcheck shell=bash
# Functions of the job scripts of this folder. Slurm copies a script elsewhere, but runs it in the
# folder where sbatch was called: the project's folder.

# shellcheck source=slurm/cluster.env
source slurm/cluster.env
lf_setup

# The name of a task of an array has both numbers, because SLURM_JOB_ID of the last task is also the
# number of the whole array.
LF_JOB=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  LF_JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi

# The notes of these functions. Slurm writes its logs there by default, but --output may name another.
mkdir -p slurm/logs

# Caches of compilers are on the local disk, because ranks must not write to one folder over the
# network. Each start has its own folder for extensions: a killed process leaves its build locked.
LF_LOCAL=${TMPDIR:-/tmp}/latent-foundry-$UID
# Their files are run as they are, and anybody can take this name first. Python checks it on each node.
(umask 077 && mkdir -p "$LF_LOCAL")
if [[ -L $LF_LOCAL || ! -O $LF_LOCAL || $(stat --format=%A "$LF_LOCAL") != d????-??-? ]]; then
  echo "error: other users can change $LF_LOCAL, and with it the code that is run:" \
    "remove it, or set TMPDIR to a folder of your own" >&2
  exit 1
fi
export PYTHONDONTWRITEBYTECODE=1
export TRITON_CACHE_DIR=$LF_LOCAL/triton
export TORCHINDUCTOR_CACHE_DIR=$LF_LOCAL/inductor
export TORCH_EXTENSIONS_DIR=$LF_LOCAL/extensions-$LF_JOB-${SLURM_RESTART_COUNT:-0}

# Evaluations ask for other sizes of GPU memory than training; segments that can grow leave fewer gaps.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}}
# Readers of data are forked. Without these, InfiniBand drivers may lose memory that a fork shares.
export IBV_FORK_SAFE=${IBV_FORK_SAFE-1} RDMAV_FORK_SAFE=${RDMAV_FORK_SAFE-1}

# Find the node of rank 0, and a free port on it below the range of outgoing connections.
lf_rendezvous() {
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
  while (: <"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do
    MASTER_PORT=$((20000 + (MASTER_PORT + 1) % 12000))
  done
  export MASTER_ADDR MASTER_PORT
}

# Run a command once for each GPU of the job; returns the first exit code that is not 0.
export LF_FIRST_CODE=slurm/logs/$LF_JOB.code
lf_srun() {
  local code=0
  rm -f "$LF_FIRST_CODE"
  # after sbatch --export=NONE, ranks would get none of the variables that are set here
  srun --export=ALL --ntasks-per-node="${SLURM_GPUS_ON_NODE:-1}" --wait=0 "$@" || code=$?
  if ((code)) && [[ -s $LF_FIRST_CODE ]]; then
    code=$(<"$LF_FIRST_CODE")
  fi
  rm -f "$LF_FIRST_CODE"
  return "$code"
}

# Take the progress of the run at this start, one line; end the job if its last starts, which went back
# into the queue by themselves, got no further.
LF_LEDGER=slurm/logs/$LF_JOB.starts
lf_start_at() {
  LF_PLACE=$1
  touch "$LF_LEDGER"
  if (($(tail -n "$LF_STALLED_STARTS" "$LF_LEDGER" | grep -cFxe "$LF_PLACE") >= LF_STALLED_STARTS)); then
    echo "error: $LF_STALLED_STARTS starts of job $LF_JOB got no further than $LF_PLACE;" \
      "mend what is said above, then submit it again" >&2
    exit 1
  fi
}

# Print the meaning of a rank's exit code.
lf_meaning() {
  "$LF_PYTHON" -m trainer.runtime.launcher "$1"
}

# Put the job back into the queue, unless scancel, an administrator or Slurm has ended this start
# already. Such a start says nothing about the run, so it is not counted.
lf_requeue() {
  if [[ $(scontrol --oneliner show job "$LF_JOB") == *" JobState=RUNNING "* ]]; then
    [[ -z ${LF_PLACE:-} ]] || printf "%s\n" "$LF_PLACE" >>"$LF_LEDGER"
    echo "job $LF_JOB goes back into the queue: $1"
    scontrol requeue "$LF_JOB"
  fi
}
