# shellcheck shell=bash
# What the exit status of a command asks of whoever started it: docs/reliability.md.
# To be sourced; the manifests of launch/gke ask the same of Kubernetes.

# done: it is finished. stop: a person has to mend something. again: it was stopped from outside
# (SIGTERM, a lost host, storage), start it as often as that happens. count: start it again too, but
# count: a fault of the program comes back.
verdict() {
  case $1 in
    0) echo 'done' ;;
    2 | 130) echo stop ;;
    75 | 143) echo again ;; # 143: SIGTERM came before the program could take it
    *) echo count ;;
  esac
}
