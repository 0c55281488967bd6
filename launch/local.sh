#!/usr/bin/env bash
# Runs a command as several processes of this machine, as a JobSet runs it on several hosts.
#
#   launch/local.sh N [--] [command ...]
#
#   N        how many processes
#   command  what each of them runs; without one, the rehearsal: launch/rehearsal.sh N
#
#   WORKDIR       (environment)  where logs and compiled programs go; runs/local by default
#   DEVICES       (environment)  CPU devices of each process; 1 by default
#   GRACE         (environment)  seconds between SIGTERM and SIGKILL; 30 by default
#   MAX_RESTARTS  (environment)  how often a fault of the program is forgiven; 10 by default
#
#   launch/local.sh 2 .venv/bin/python -m lumina_jax.train --config=configs/tiny.py \
#     --workdir=runs/tiny
#
# Each process gets the variables by which those of a JobSet find each other, and is shut off like
# a container: it is told to end by a SIGTERM to its first program, and when that one has ended, all
# that it started is killed. Lines come out with the number of their process, and go to
# WORKDIR/logs/START.PROCESS.log; what happens to the processes is in WORKDIR/logs/events.log.
#
# The first process that ends with another status than 0 decides (docs/reliability.md): 2 and 130
# stop all, and this ends so too; with any other status the rest is terminated, and when all are
# gone, all are started again, after 75 and 143 as often as that happens. It ends with 0 when all
# did, and with the last status when MAX_RESTARTS are used up. Ctrl-C (130), SIGTERM and a
# closed terminal (75) end it: all processes get a SIGTERM and their GRACE; a second signal kills
# them. If this script is killed itself, each process still gets a SIGTERM; what ignores it, or has
# moved to a session of its own (setsid), stays.
set -euo pipefail
here=$(dirname "$0")
# shellcheck source=launch/cli.sh
. "$here/cli.sh"
# shellcheck source=launch/verdict.sh
. "$here/verdict.sh"

# whole NAME VALUE LEAST
whole() {
  [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ && $2 -ge $3 ]] ||
    die "$1 is '$2'; needed: a whole number from $3 on, see launch/local.sh --help."
}

[[ ${1:-} != -h && ${1:-} != --help ]] || usage 0
(($# >= 1)) || usage 2 >&2
num_processes=$1
shift
[[ ${1:-} != -- ]] || shift
workdir=${WORKDIR:-runs/local} devices=${DEVICES:-1} grace=${GRACE:-30}
max_restarts=${MAX_RESTARTS:-10}
whole N "$num_processes" 1
whole DEVICES "$devices" 1
whole GRACE "$grace" 0
whole MAX_RESTARTS "$max_restarts" 0
(($# > 0)) || exec "$here/rehearsal.sh" "$num_processes"

((BASH_VERSINFO[0] >= 5)) || die "This is bash $BASH_VERSION; needed: 5.0 or newer."
for tool in setsid setpriv pkill; do
  command -v "$tool" >/dev/null ||
    die "$tool is not there; needed: Linux with util-linux (setsid, setpriv) and procps (pkill)."
done
type -P -- "$1" >/dev/null || die "'$1' is not a program; needed: the command of each process."

logs=$workdir/logs
mkdir -p "$logs" || die "WORKDIR is '$workdir'; needed: a folder that can be written to."
: >"$logs/events.log"
cache=${JAX_COMPILATION_CACHE_DIR:-$(cd "$workdir" && pwd)/compiled}

# say TEXT: what happens to the processes, on the screen and in events.log.
say() {
  echo "$(date +%T) $1" >>"$logs/events.log"
  echo "[local] $1" || true # the terminal may be closed
}

# Below the ports that the kernel gives away by itself, so that it stays free until it is used.
free_port() {
  local port
  while port=$((20000 + RANDOM % 12000)); do
    (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

declare -A running=()  # process number by id, which is also that of its session
printers=()            # what prints their lines
decided=''             # the status that decided over this start
signalled=''           # the signal that ends all
deadline=''            # when the grace is over, in microseconds

# start ADDRESS PROCESS command ...
start() {
  local address=$1 process=$2 out
  shift 2
  # A Ctrl-C at the terminal is not for those who print the last lines.
  exec {out}> >(
    trap '' INT TERM HUP
    tee -p "$logs/$starts.$process.log" | sed -u "s/^/[$process] /"
  )
  printers+=("$!")
  JOB_COMPLETION_INDEX=$process \
    JAX_COORDINATOR_ADDRESS=$address JAX_NUM_PROCESSES=$num_processes JAX_PROCESS_ID=$process \
    JAX_COMPILATION_CACHE_DIR=$cache JAX_PLATFORMS=cpu \
    XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices" \
    setsid setpriv --pdeathsig TERM env --default-signal=INT,QUIT "$@" \
    </dev/null >&"$out" 2>&1 {out}>&- &
  running[$!]=$process
  echo "$!" >"$logs/$process.pid"
  exec {out}>&-
}

# As the deletion of a pod: its first program is asked to end, later all is killed.
terminate() {
  ((${#running[@]})) || return 0
  kill -TERM "${!running[@]}" 2>/dev/null || true
  deadline=$((${EPOCHREALTIME/[.,]/} + grace * 1000000))
}

# kill_sessions ID ...: returns when all of them are gone; a zombie is.
kill_sessions() {
  local session
  for session; do
    while pkill -KILL --runstates D,R,S,T,t --session "$session"; do sleep 0.02; done
  done
}

on_signal() {
  if [[ $signalled ]]; then
    kill_sessions "${!running[@]}"
  else
    signalled=$1
    say "Told to end: SIGTERM to all, SIGKILL after $grace s or at the next signal."
    terminate
  fi
}

# Waits until all are gone, as JobSet's BlockingRecreate does; the first failure ends the others.
watch() {
  local id
  while ((${#running[@]})); do
    # `wait -n` of several loses those that end at once (bash 5.2). Ctrl-C ends this sleep too.
    sleep 0.1 || true
    for id in "${!running[@]}"; do
      kill -0 "$id" 2>/dev/null || ended "$id"
    done
    if [[ $deadline ]] && ((${#running[@]} && ${EPOCHREALTIME/[.,]/} > deadline)); then
      say "SIGKILL to process(es) ${running[*]}: not gone $grace s after SIGTERM."
      kill_sessions "${!running[@]}"
      deadline=''
    fi
  done
  deadline=''
  wait "${printers[@]}" || true
  printers=()
}

ended() {
  local process=${running[$1]} status=0
  wait "$1" || status=$?
  unset "running[$1]"
  kill_sessions "$1" # what it has left behind
  say "Process $process ended with $status."
  [[ $status != 0 && -z $decided ]] || return 0
  decided=$status
  [[ ${#running[@]} == 0 || $signalled ]] ||
    say "SIGTERM to process(es) ${running[*]}, SIGKILL after $grace s."
  [[ $signalled ]] || terminate
}

trap 'on_signal INT' INT
trap 'on_signal TERM' TERM HUP
trap 'kill_sessions "${!running[@]}"' EXIT # nothing stays when this script itself fails

starts=0 restarts=0
while true; do
  ((++starts))
  decided=''
  address=127.0.0.1:$(free_port)
  say "Start $starts: $num_processes process(es), process 0 listens at $address."
  for ((process = 0; process < num_processes; process++)); do
    start "$address" "$process" "$@"
  done
  [[ -z $signalled ]] || terminate # it came while they were started
  watch 2>/dev/null # where bash tells of each that was killed, with all of its command
  case $signalled in
    INT) exit 130 ;;
    TERM) exit 75 ;;
  esac
  case $(verdict "${decided:-0}") in
    done)
      say "Done: all ended with 0 after $starts start(s)."
      exit 0
      ;;
    stop)
      say "Stop: a person has to mend what ended with $decided."
      exit "$decided"
      ;;
    again) say "Again: $decided is a stop from outside and does not count." ;;
    count)
      if ((restarts == max_restarts)); then
        say "Stop: $decided after $restarts counted restart(s), MAX_RESTARTS=$max_restarts."
        exit "$decided"
      fi
      ((++restarts))
      say "Again: $decided counts, restart $restarts of $max_restarts."
      ;;
  esac
done
