#!/usr/bin/env bash
# Trains the three stages one after another, each from the one before.
#
#   launch/stages.sh WORKDIR DATA1 DATA2 DATA3 [flag ...]
#
#   WORKDIR          the runs are WORKDIR/stage1, WORKDIR/stage2 and WORKDIR/stage3
#   DATA1 ... DATA3  directory of the data of each stage; '' leaves it to the config
#   flag ...         of lumina_jax.train, handed to every stage
#
#   STAGES  (environment)  three configs; those of the paper by default
#   PYTHON  (environment)  the interpreter; .venv/bin/python by default
#
#   launch/stages.sh gs://bucket/run gs://bucket/data/256 gs://bucket/data/1024 gs://bucket/data/hq
#
# Given again it goes on where it stopped: a finished stage says "Nothing to do". It ends at the
# first stage whose exit status is not 0, with that status. SIGINT and SIGTERM are handed on, once,
# so the stage saves and leaves with 75. Run it from the root of the checkout, on every host alike.
set -euo pipefail

here=$(dirname "$0")
# shellcheck source=launch/cli.sh
. "$here/cli.sh"

[[ ${1:-} != -h && ${1:-} != --help ]] || usage 0
(($# >= 4)) || usage 2 >&2

workdir=${1%/}
data=("$2" "$3" "$4")
shift 4
read -ra configs <<<"${STAGES:-configs/stage1.py configs/stage2.py configs/stage3.py}"
((${#configs[@]} == 3)) || die "STAGES is '$STAGES'; needed: three configs."
python=${PYTHON:-.venv/bin/python}
type -P -- "$python" >/dev/null ||
  die "PYTHON=$python is not a program; needed: the interpreter, in the checkout's root."

# A process group of its own, so that Ctrl-C reaches the stage through here alone: a second signal
# would end it without a checkpoint.
set -m
stage='' signalled=''
trap 'signalled=1; kill -TERM "$stage" 2>/dev/null || exit 75' INT TERM

run() {
  local status
  "$@" &
  stage=$!
  while true; do # a signal ends the wait, but not yet the stage
    status=0
    wait "$stage" || status=$?
    kill -0 "$stage" 2>/dev/null || break
  done
  if [[ $signalled ]] && ((status == 0)); then status=75; fi
  return "$status"
}

flags=()
for number in 1 2 3; do
  run_dir=$workdir/stage$number
  [[ -z ${data[number - 1]} ]] || flags+=("--config.data.directory=${data[number - 1]}")
  echo "Stage $number of 3: $run_dir" >&2
  run "$python" -m lumina_jax.train "--config=${configs[number - 1]}" "$@" \
    "--workdir=$run_dir" "${flags[@]}" || exit
  flags=("--config.train.init_from=$run_dir")
done
