set -euo pipefail
umask 077
files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT

say() { echo "$(date '+%F %T') $tpu: $*" >&2; }

# The state of a tpu-vm or of the queued resource behind it; ABSENT where there is none, UNKNOWN where nobody answers.
ask() {
  if gcloud compute tpus "$1" describe "$tpu" "${place[@]}" --format="value($2)" 2> "$files/error"; then return; fi
  if grep -q NOT_FOUND "$files/error"; then echo ABSENT; else echo UNKNOWN; fi
}

on() { gcloud compute tpus tpu-vm ssh "$tpu" "${place[@]}" --worker="$1" --command="$2"; }

request() {
  [ "$create" = yes ] || { say "there is no slice of this name that runs; make one, or give --create"; exit 1; }
  say "asking for a slice"
  gcloud compute tpus queued-resources create "$tpu" --node-id="$tpu" "${place[@]}" "${kind[@]}"
}

replace() {
  [ "$create" = yes ] || { say "the slice was taken; make another and start this again, or give --create"; exit 1; }
  say "the slice was taken"
  begun=no starts=0
  gcloud compute tpus queued-resources delete "$tpu" "${place[@]}" --force --quiet && request
}

# Runs on every worker, once at each start, as a script that holds these functions and variables.
worker() {
  set -euo pipefail
  rm -f ~/qedjax/run.sh  # it holds secrets; they are variables by now
  cd ~/qedjax
  exec 9> lock  # held by the process as long as it lives
  flock -w 300 9 || { echo "$(hostname): the process of an earlier start does not end" >&2; exit 1; }
  rm -f exit
  eval "$prepare" || { echo "$(hostname): --prepare ended with status $?" >&2; exit 1; }
  cd ~/qedjax
  mkdir -p "$logs"
  log=$(cd "$logs" && pwd)/$tpu-$(hostname).log
  mkdir -p "$commit"
  tar xzf code.tar.gz -C "$commit"
  cd "$commit"
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  if [ ! -e .venv/installed ]; then
    rm -rf .venv
    uv venv -q --python 3.12
    uv pip install -q '.[tpu]'
    touch .venv/installed
  fi
  nohup setsid bash -c 'trap : TERM; "$@"; echo $? > ~/qedjax/exit' run .venv/bin/python "${command[@]}" >> "$log" 2>&1 < /dev/null &
  echo $! > ~/qedjax/pid
  echo "$(hostname): started, log $log"
}

start() {
  say "starting ${command[*]} on all workers"
  git archive --format=tar.gz --output="$files/code.tar.gz" "$commit" &&
    { declare -p tpu commit prepare logs command ${secrets[@]+"${secrets[@]}"} && declare -f worker && echo worker; } > "$files/run.sh" &&
    on all 'mkdir -p -m 700 ~/qedjax' &&
    gcloud compute tpus tpu-vm scp "$files/code.tar.gz" "$files/run.sh" "$tpu:qedjax/" "${place[@]}" --worker=all &&
    on all 'bash ~/qedjax/run.sh'
}

# running, or the exit status of the last process, or nothing where one was cut off or never was.
look='if [ -e ~/qedjax/lock ] && ! flock -n ~/qedjax/lock true; then echo running; else cat ~/qedjax/exit 2> /dev/null || echo; fi'

attend() {
  local found
  found=$(on 0 "$look" 2> /dev/null) || return 0  # it cannot be reached for now
  case "$begun-$found" in
    no-running) say "a run is under way; watching it"; begun=yes ;;
    yes-running) ;;
    yes-0) say "finished"; exit 0 ;;
    yes-2) say "ended with exit code 2; the log has the reason in its last line"; exit 2 ;;
    *)
      [ "$begun" = no ] || say "the process of worker 0 ended with status '$found'"
      [ "$starts" -le "$restarts" ] || { say "gave up after $starts starts; the logs say why"; exit 1; }
      [ "$found" = 143 ] || starts=$((starts + 1))  # 143: the machine was to go, and the run was saved
      if start; then begun=yes; else begun=no; say "could not start; trying again"; fi ;;
  esac
}

begun=no starts=0
while :; do
  case "$(ask tpu-vm state)" in
    READY) attend ;;
    PREEMPTED | TERMINATED | STOPPED) replace || say "could not replace it; trying again" ;;
    ABSENT)
      case "$(ask queued-resources state.state)" in
        ABSENT) request ;;
        SUSPENDED | FAILED) replace || say "could not replace it; trying again" ;;
      esac ;;
  esac
  sleep "$poll"
done
