set -euo pipefail

# Slurm starts one process a node, and jax would take that to mean one GPU a process.
export JAX_LOCAL_DEVICE_IDS="$devices"

# Before the time limit: the processes are told to end, and the job is queued again, at the latest while it may still ask for that.
again=no
stop() {
  again=yes
  echo "$(date '+%F %T') the time limit is near: stopping, to go on in a next turn of this job"
  scancel --signal=TERM "$SLURM_JOB_ID" || true
  { sleep "$patience"; scontrol requeue "$SLURM_JOB_ID"; } &
}
trap stop USR1

srun --kill-on-bad-exit=1 --cpu-bind=none --open-mode=append --output="$logs/%x-%j-%t.log" "${command[@]}" &
step=$! code=0
wait "$step" || code=$?
if [ "$again" = yes ]; then  # the signal ended the waiting, not the step
  code=0
  wait "$step" || code=$?
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
