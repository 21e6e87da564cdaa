#!/usr/bin/env bash
# What srun starts for each rank: lines of rank 0 stand in the job's log as they are, those of the
# others behind their names. Leaves behind the exit code of the rank that failed first, since srun
# ends all others then, and knows the highest of all codes only.
#
# Slurm signals every process of a job. Its warning before the time limit must not kill a rank before
# Python listens, and no signal the process that writes the names.
trap "" USR1
trap : TERM INT
if ((SLURM_PROCID > 0)); then
  exec > >(
    trap "" TERM INT
    exec sed --unbuffered "s/^/[rank $SLURM_PROCID, $SLURMD_NODENAME] /"
  ) 2>&1
fi

code=0
"$@" || code=$?
if ((code)); then
  (set -o noclobber && echo "$code" >"$LF_FIRST_CODE") 2>/dev/null
fi
exit "$code"
