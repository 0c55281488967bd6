#!/usr/bin/env bash
# One host's part of launch/tpu_vm.sh, which calls it over ssh: a run that outlives its connection.
#
#   launch/tpu_vm_host.sh install                     make .venv of launch/locks/tpu.txt
#   launch/tpu_vm_host.sh start ATTEMPT command ...   start it, once for each name ATTEMPT
#   launch/tpu_vm_host.sh state                       print "@host NAME STATE ATTEMPT"
#   launch/tpu_vm_host.sh log FROM                    print the log, each line after the host's name
#   launch/tpu_vm_host.sh stop TERM|KILL [ATTEMPT]    end the command, or it and all its children
#
#   FROM   as for tail -n: 20, the last twenty lines, or +1, all; then what comes until the run ends
#          +N prints "@log N" first: so who is connected again knows where this begins
#   STATE  none, running, lost (gone without a word: the host was started again), or the exit status
#
#   launch/tpu_vm_host.sh start first .venv/bin/python -m lumina_jax.train --help
#
# What is known of a run lies in ~/.lumina_jax: attempt, session, pid, status, log (one for each
# attempt, in logs), and the lock that every process of the run holds, so that no number of a dead
# process is taken for it. The file env there holds variables, NAME=value, for install and start.
set -euo pipefail
cd "$(dirname "$0")/.."
home=$HOME/.lumina_jax
mkdir -p "$home"
chmod 700 "$home"

usage() {
  sed -n '2,/^set -/s/^# \{0,1\}//p' launch/tpu_vm_host.sh
  exit "$1"
}

die() {
  echo "error: $(hostname): $1" >&2
  exit 2
}

read_env() {
  local line
  [[ -f $home/env ]] || return 0
  while IFS= read -r line || [[ $line ]]; do
    [[ ! $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || export "${line?}"
  done <"$home/env"
}

# The image has an older Python than is needed; uv brings one, and has no need of root.
install() {
  read_env
  local uv
  uv=$(command -v uv || true)
  if [[ -z $uv ]]; then
    python3 -m pip install --quiet --user --upgrade 'uv>=0.9'
    uv=$HOME/.local/bin/uv
  fi
  "$uv" venv --quiet --allow-existing --python=3.11 .venv
  # The build tools first: they are those of a lock too, for the one package without a wheel.
  "$uv" pip install --quiet --python=.venv --require-hashes --requirement launch/locks/build.txt
  "$uv" pip sync --quiet --python=.venv --require-hashes --no-build-isolation \
    launch/locks/build.txt launch/locks/tpu.txt
}

alive() {
  ! flock --nonblock "$home/lock" true
}

begun() { # ATTEMPT
  [[ -f $home/attempt && $(cat "$home/attempt") == "$1" ]]
}

# start ATTEMPT command ...
start() {
  exec 9>>"$home/lock"
  flock --wait 1 9 || { # not at once: `state` looks at it too
    begun "$1" && return
    die "another run is alive; needed: launch/tpu_vm.sh stop."
  }
  begun "$1" && return
  read_env
  rm -f "$home/pid" "$home/status" "$home/attempt"
  mkdir -p "$home/logs"
  ln -sfn "logs/$1" "$home/log"
  # tools/*.py import lumina_jax, which is no package of the environment.
  PATH=$PWD/.venv/bin:$PATH PYTHONPATH=$PWD setsid --fork launch/tpu_vm_host.sh supervise "$@" \
    </dev/null >>"$home/log" 2>&1
  exec 9>&-
  until begun "$1"; do
    alive || die "the run has not begun; is the disk full?"
    sleep 0.05
  done
}

# supervise ATTEMPT command ...
# Waits for the command and writes down how it ended; the lock is inherited.
supervise() {
  local status attempt=$1
  shift
  trap : TERM # at a shutdown every process is told, so it need not be handed on
  echo "--- $(date +%FT%T) $*"
  echo "$$" >"$home/session"
  echo "$attempt" >"$home/attempt" # it has begun: on a full disk it never does
  "$@" &
  echo "$!" >"$home/pid"
  while true; do
    status=0
    wait "$!" || status=$?
    kill -0 "$!" 2>/dev/null || break
  done
  echo "--- $(date +%FT%T) exit status $status"
  echo "$status" >"$home/status.new"
  mv "$home/status.new" "$home/status"
}

state() {
  local state=none
  if [[ -f $home/status ]]; then
    state=$(cat "$home/status")
  elif alive; then
    state=running
  elif [[ -f $home/status ]]; then # it has just ended
    state=$(cat "$home/status")
  elif [[ -f $home/attempt ]]; then
    state=lost
  fi
  echo "@host $(hostname) $state $(cat "$home/attempt" 2>/dev/null || true)"
}

# log FROM
log() {
  local pid=4194305 # above all that Linux gives: tail ends at once
  [[ -f $home/log ]] || die "there is no run yet."
  if alive && [[ -f $home/pid ]]; then pid=$(cat "$home/pid"); fi
  [[ $1 != +* ]] || echo "@log ${1#+}"
  tail --lines="$1" --follow --sleep-interval=0.5 --pid="$pid" "$home/log" |
    sed -u "s/^/$(hostname): /"
}

# stop SIGNAL [ATTEMPT]
stop() {
  alive && [[ -f $home/pid ]] || return 0
  [[ -z ${2:-} ]] || begun "$2" || return 0
  case $1 in
    TERM) kill -TERM "$(cat "$home/pid")" || true ;;
    KILL) pkill -KILL --session "$(cat "$home/session")" || true ;;
    *) die "'$1' is not TERM or KILL." ;;
  esac
}

case ${1:-} in
  install | state) (($# == 1)) || usage 2 >&2 ;;
  log) (($# == 2)) || usage 2 >&2 ;;
  stop) (($# == 2 || $# == 3)) || usage 2 >&2 ;;
  start) (($# >= 3)) || usage 2 >&2 ;;
  supervise) ;;
  -h | --help) usage 0 ;;
  *) usage 2 >&2 ;;
esac
"$@"
