# shellcheck shell=bash
# Shared by the job scripts of this folder. They run in the project's folder, where sbatch was
# called; Slurm copies the script itself elsewhere.

# shellcheck source=slurm/cluster.env
source slurm/cluster.env
lf_setup

# An element of an array goes by both numbers: the plain one of the last is that of the whole array.
LF_JOB=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  LF_JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi

# Ranks that write to one folder at the same time, over the network, is what these avoid. A build
# that a killed process left locked would block the next one, so each start has a folder of its own.
LF_LOCAL=${TMPDIR:-/tmp}/latent-foundry-$UID
export PYTHONDONTWRITEBYTECODE=1
export TRITON_CACHE_DIR=$LF_LOCAL/triton
export TORCHINDUCTOR_CACHE_DIR=$LF_LOCAL/inductor
export TORCH_EXTENSIONS_DIR=$LF_LOCAL/extensions-$LF_JOB-${SLURM_RESTART_COUNT:-0}

# Where rank 0 is, and a port of its node that is free: below those that the kernel gives away.
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
  srun --ntasks-per-node="${SLURM_GPUS_ON_NODE:-1}" --wait=0 "$@" || code=$?
  if ((code)) && [[ -s $LF_FIRST_CODE ]]; then
    code=$(<"$LF_FIRST_CODE")
  fi
  rm -f "$LF_FIRST_CODE"
  return "$code"
}

# Remember how far this job is at this start; end it where its last starts all got no further.
lf_start_at() {
  local ledger=slurm/logs/$LF_JOB.starts place=$1
  echo "$place" >>"$ledger"
  if (($(tail -n $((LF_STALLED_STARTS + 1)) "$ledger" | grep -cFx "$place") > LF_STALLED_STARTS)); then
    echo "error: $LF_STALLED_STARTS starts of job $LF_JOB got no further than $place;" \
      "mend what is said above, then submit it again" >&2
    exit 1
  fi
}

# Back into the queue, unless scancel or Slurm itself has ended this start already.
lf_requeue() {
  if [[ $(scontrol --oneliner show job "$LF_JOB") == *" JobState=RUNNING "* ]]; then
    echo "job $LF_JOB goes back into the queue: $1"
    scontrol requeue "$LF_JOB"
  fi
}
