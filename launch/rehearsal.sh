#!/usr/bin/env bash
# Rehearses a run on several hosts, with stops, as several processes of this machine.
#
#   launch/rehearsal.sh N
#
#   N  how many processes
#
#   WORKDIR       (environment)  of data, compiled programs and runs; runs/rehearsal by default
#   KILL          (environment)  the process that is killed (SIGKILL) in stage 2, or none; the last
#                                one by default
#   PREEMPT       (environment)  the process that gets a SIGTERM in stage 3, or none; 0 by default
#   LOST_TIMEOUT  (environment)  seconds of silence after which a process is lost; 10 by default
#   PYTHON        (environment)  the interpreter; .venv/bin/python by default
#   DEVICES, GRACE, MAX_RESTARTS (environment)  of launch/local.sh
#
#   launch/rehearsal.sh 2          the same as launch/local.sh 2; about three minutes on two cores
#   KILL=none PREEMPT=none launch/rehearsal.sh 2
#
# Three small stages (configs/rehearsal.py) are run by launch/stages.sh in each process. In stage 2,
# after its first checkpoint, one process is killed: the others notice, all are started again and go
# on from the checkpoint. In stage 3 one is told to end: all save and leave with 75, and the next
# start goes on exactly there. What happened is listed at the end, with what was checked of it. It
# ends with 0 if all was as it should be and with 1 if not. Run it from the root of the checkout.
set -euo pipefail
here=$(dirname "$0")
# shellcheck source=launch/cli.sh
. "$here/cli.sh"

# process_or_none NAME VALUE
process_or_none() {
  [[ $2 == none ]] || [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ && $2 -lt $num_processes ]] ||
    die "$1 is '$2'; needed: a process from 0 to $((num_processes - 1)), or none."
}

[[ ${1:-} != -h && ${1:-} != --help ]] || usage 0
(($# == 1)) || usage 2 >&2
num_processes=$1
[[ $num_processes =~ ^[1-9][0-9]{0,5}$ ]] ||
  die "N is '$num_processes'; needed: a whole number from 1 on, see launch/rehearsal.sh --help."
kill=${KILL:-$((num_processes - 1))} preempt=${PREEMPT:-0}
process_or_none KILL "$kill"
process_or_none PREEMPT "$preempt"
lost_timeout=${LOST_TIMEOUT:-10}
[[ $lost_timeout =~ ^[1-9][0-9]{0,5}$ ]] ||
  die "LOST_TIMEOUT is '$lost_timeout'; needed: seconds, a whole number from 1 on."
workdir=${WORKDIR:-runs/rehearsal} python=${PYTHON:-.venv/bin/python}
[[ -f tools/prepare_data.py ]] || die "$PWD is not the root of the checkout; start it there."
type -P -- "$python" >/dev/null ||
  die "PYTHON=$python is not a program; needed: the interpreter. \`make venv\` makes this one."
mkdir -p "$workdir" || die "WORKDIR is '$workdir'; needed: a folder that can be written to."
workdir=$(cd "$workdir" && pwd) # as the program names it in what it says
data=$workdir/data run=$workdir/$(date +%Y%m%d-%H%M%S)
mkdir -p "$run/logs"

echo "Two to four minutes on two cores, most of them for compiling."
echo "Logs: $run/logs"
"$python" tools/prepare_data.py openmoji --output="$data" --resolution=16,32 --fit=pad \
  --pixels_per_token=4 --emojis=🐶🐱🍎🍋🏠🌞😀🎈🐼🦊🦁🐸 &>"$run/logs/data.log" || {
  status=$?
  cat "$run/logs/data.log" >&2
  exit "$status"
}

# Of what the processes say, what tells the course of the run, without time and place in the
# program; all of it is in the logs.
course='Stage [0-9] of|All [0-9]+ processes|Going on|Nothing to do|Hand-over|The first step|Done:'
course+='|Stopped at|Process [0-9]+ of [0-9]+ gave|error:'
on_screen() {
  trap '' INT TERM HUP
  sed -nEu -e '/^\[local\]/p' -e "s/^(\[[0-9]+\] )([IWEF][0-9]{4} [^]]*\] )?($course)/\1\3/p" |
    sed -Eu -e "s#$run/##g" -e 's/^(.{97}).{4,}/\1.../'
}

exec {screen}> >(on_screen)
printer=$!
# A process group of its own, so that Ctrl-C reaches it through here alone: the second signal kills.
set -m
# Compiling takes most of the time, and half of it without optimisation.
WORKDIR=$run JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$workdir/compiled} \
  XLA_FLAGS=${XLA_FLAGS---xla_backend_optimization_level=0} \
  STAGES="configs/rehearsal.py:1 configs/rehearsal.py:2 configs/rehearsal.py:3" \
  setpriv --pdeathsig TERM "$here/local.sh" "$num_processes" -- \
  "$here/stages.sh" "$run" "$data/16" "$data/32" "$data/32" --lost_timeout="$lost_timeout" \
  >&"$screen" {screen}>&- &
cluster=$!
set +m # what is started from here on, such as a sleep, must not take Ctrl-C away
exec {screen}>&-
signalled=''
trap 'signalled=1; kill -INT "$cluster"' INT
trap 'signalled=1; kill -TERM "$cluster"' TERM HUP

# await CONDITION ...: false if all ends before, or is told to.
await() {
  until "$@"; do
    [[ ! $signalled ]] && kill -0 "$cluster" 2>/dev/null || return 1
    sleep 0.05 || true
  done
  [[ ! $signalled ]]
}

# say TEXT: as launch/local.sh tells what happens to the processes.
say() {
  echo "$(date +%T) $1" >>"$run/logs/events.log"
  echo "[local] $1"
}

has_checkpoint() {
  [[ $(find "$run/stage2/checkpoints" -maxdepth 1 -regex '.*/[0-9]+' 2>/dev/null) ]]
}

if [[ $kill != none ]] && await has_checkpoint; then
  say "Stage 2 has a checkpoint: SIGKILL to process $kill."
  pkill -KILL --session "$(<"$run/logs/$kill.pid")" || true
fi
if [[ $preempt != none ]] && await test -e "$run/stage3/metrics.jsonl"; then
  say "Stage 3 has begun: SIGTERM to process $preempt."
  kill -TERM "$(<"$run/logs/$preempt.pid")" || true
fi
while true; do # a signal ends the wait, but not yet the processes
  status=0
  wait "$cluster" || status=$?
  kill -0 "$cluster" 2>/dev/null || break
done
wait "$printer" || true
if ((status == 130 || status == 75)); then
  echo "Ended by a signal; logs are in $run/logs."
  exit "$status"
fi
if ((status == 2)); then
  echo "Ended by the error above; logs are in $run/logs."
  exit 2
fi

# What follows asks the logs.

# events START: what happened to the processes in it.
events() {
  awk -v start="$1:" '$2 == "Start" { is_it = $3 == start } is_it' "$run/logs/events.log"
}

# said START PROCESS PATTERN: what a process has said in it.
said() {
  grep -qE -- "$3" "$run/logs/$1.$2.log"
}

all_said() { # START PATTERN
  local process
  for ((process = 0; process < num_processes; process++)); do
    said "$1" "$process" "$2" || return 1
  done
}

# step_of START PATTERN: the step that process 0 has named there.
step_of() {
  sed -nE "s#.*$2.*#\1#p" "$run/logs/$1.0.log"
}

was_killed() {
  events 1 | grep -q "Process $kill ended with 137" && events 1 | grep -q 'Again: 137 counts'
}

others_noticed() {
  (($(events 1 | grep -c 'ended with 75') == num_processes - 1))
}

goes_on_after_kill() {
  all_said 2 'Nothing to do: .*/stage1 ' &&
    all_said 2 "Going on from step $went_on in .*/stage2"
}

all_saved() {
  all_said "$preempted" "Stopped at step $saved, which is saved" &&
    events "$preempted" | grep -q 'Again: 75 is a stop from outside and does not count'
}

goes_on_there() {
  all_said $((preempted + 1)) 'Nothing to do: .*/stage2 ' &&
    all_said $((preempted + 1)) "Going on from step $saved in .*/stage3"
}

hands_over() { # STAGE
  grep -qF "Hand-over from $run/stage$(($1 - 1))/checkpoints/" "$run"/logs/*.0.log
}

# Steps that were lost by the kill are there twice, and must have the same loss.
has_all_steps() { # STAGE LAST
  [[ $2 ]] && cmp -s <(seq "$2") <(
    sed -nE 's/^\{"step": ([0-9]+),.*"loss": ([^,}]*).*/\1 \2/p' "$run/stage$1/metrics.jsonl" |
      sort -u | cut -d ' ' -f1 | sort -n
  )
}

num_wrong=0
# check TEXT CONDITION ...
check() {
  local text=$1 mark=ok
  shift
  "$@" 2>/dev/null || mark=WRONG num_wrong=$((num_wrong + 1))
  printf '  %-8s  %s\n' "$mark" "$text"
}

printf '\nWhat happened\n'
sed 's/^/  /' "$run/logs/events.log"
printf '\nIs it as it should be\n'
num_starts=1
if [[ $kill != none ]]; then
  ((++num_starts))
  check "Process $kill was killed in stage 2, which counts." was_killed
  ((kill == 0 || num_processes == 1)) ||
    check "The others noticed it and ended with 75." others_noticed
  went_on=$(step_of 2 'Going on from step ([0-9]+) in .*/stage2') || true
  check "Stage 1 had nothing to do, stage 2 went on from step ${went_on:-?}." goes_on_after_kill
fi
if [[ $preempt != none ]]; then
  preempted=$num_starts
  ((++num_starts))
  saved=$(step_of "$preempted" 'Stopped at step ([0-9]+), which is saved') || true
  check "Process $preempt was told to end in stage 3: all saved step ${saved:-?}; not counted." \
    all_saved
  check "Stage 2 had nothing to do, stage 3 went on from step ${saved:-?}." goes_on_there
fi
check "Stage 2 began with what stage 1 had learned." hands_over 2
check "Stage 3 began with what stage 2 had learned." hands_over 3
for stage in 1 2 3; do
  last=$(cat "$run"/logs/*.0.log | sed -nE "s#.*Done: ([0-9]+) steps;.*/stage$stage/.*#\1#p")
  check "Stage $stage has steps 1 to ${last:-?}, each with one loss." has_all_steps "$stage" "$last"
done
check "All ended with 0 after $num_starts start(s)." \
  grep -qF "Done: all ended with 0 after $num_starts start(s)." "$run/logs/events.log"
cat <<END

Where: $run
  checkpoints  stage[123]/checkpoints
  losses       stage[123]/metrics.jsonl
  logs         logs/START.PROCESS.log, logs/events.log

END
if ((num_wrong)); then
  echo "The rehearsal has failed: $num_wrong of what should be is not."
  exit 1
fi
echo "The rehearsal went well."
