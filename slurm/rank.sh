#!/usr/bin/env bash
# srun starts this script for each rank. In the job's log, the lines of ranks other than 0 begin with
# the rank and its node. LF_TASK is the rank's number in a job array, counted from LF_FIRST_TASK.
# The rank that fails first writes its exit code to a file: srun then ends the others, and returns
# only the highest of all codes.
#
# Slurm signals every process of a job. Its warning before the time limit must not kill a rank before
# Python handles it, and no signal may end the process that writes the beginnings of lines.
export LF_TASK=$((${LF_FIRST_TASK:-0} + SLURM_PROCID))
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
