# shellcheck shell=bash
# What a script of this folder says of itself: its header as the help, and an error. To be sourced.

usage() {
  sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"
  exit "$1"
}

die() {
  echo "error: $1" >&2
  exit 2
}
