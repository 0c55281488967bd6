#!/usr/bin/env bash
# Runs a command on every host of one or several slices of Cloud TPU VMs until it is done.
#
#   launch/tpu_vm.sh COMMAND [setting ...] [-- command ...]
#
#   up       create what is not there, wait for it, install, run; after a preemption all that again
#   create   ask for the slices: a queued resource
#   status   its state, and that of the run on each host
#   install  the checkout's HEAD and the packages of launch/locks/tpu.txt, on every host
#   run      the command on every host, in the checkout's root, until it is done
#   logs     the log of host 0 of slice 0 as it grows; with --all of every host
#   stop     SIGTERM to the run on every host: it saves and ends with 75. End a `run` or `up` that
#            watches it first (Ctrl-C); it would start it again
#   delete   give the slices back
#
#   --name=NAME           of the queued resource, its slices are NAME, or NAME-0, NAME-1, ...
#   --zone=ZONE           such as us-east5-a
#   --type=TYPE           of one slice, such as v5litepod-256, v5p-128 or v6e-256
#   --slices=N            how many of them, joined over the data centre's network; 1
#   --project=PROJECT     that of gcloud's configuration
#   --version=VERSION     of the image; the one for the type
#   --capacity=CAPACITY   on_demand, spot or reserved; on_demand
#   --valid_until=TIME    give up waiting for it after this long, such as 6h; never
#   --network=NETWORK, --subnetwork=SUBNETWORK, --service_account=ACCOUNT
#   --env_file=FILE       keys and the like for the hosts: lines NAME=value, taken as they are, and
#                         # comments; an `install` without it removes the one before
#   --create_flags='...'  more flags of `queued-resources create`, such as --internal-ips
#   --ssh_flags='...'     more flags of `queued-resources ssh` and `scp`: --tunnel-through-iap
#   --max_restarts=N      how often a fault of the program is forgiven; 10
#   --poll=SECONDS        between two looks at the hosts; 30
#   --grace=SECONDS       for the others once one has failed, and again after SIGTERM; 120
#   --patience=N          looks in a row at slices that are there but do not answer; 20
#   --delete              `up` and `run`: give the slices back once the command is done
#   --dry_run             print every command that would be run here, run none
#
# Each but --delete is also taken from the environment: NAME, ZONE, ..., DRY_RUN=1. On the hosts
# `python` is the one with the packages.
#
#   launch/tpu_vm.sh up --name=lumina --zone=us-east5-a --type=v6e-256 --capacity=spot -- \
#     python -m lumina_jax.train --config=configs/stage1.py --workdir=gs://BUCKET/stage1
#
# The run does not depend on this script: broken connections and Ctrl-C leave it going, and `run` or
# `up` with the same command finds it again. How it ended on the hosts decides, see
# docs/reliability.md: a status that stops ends this script with it; otherwise what still runs is
# ended, and all start again. One `run` or `up` at a time: a second one ends with 2.
#
# The slices stay, and cost, however it ends, until `delete`; with --delete they go once the command
# is done. `up` deletes what was preempted or failed, to ask anew, but no slices that are there: if
# they do not answer it asks on, and after --patience looks ends with 1.
#
# Several hosts need the key in ssh's agent: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail
here=$(dirname "$0")
# shellcheck source=launch/cli.sh
. "$here/cli.sh"
# shellcheck source=launch/verdict.sh
. "$here/verdict.sh"

say() { # word ...
  echo "[tpu_vm] $(date +%T) $*" >&2
}

name=${NAME:-} zone=${ZONE:-} type=${TYPE:-} slices=${SLICES:-1} project=${PROJECT:-}
version=${VERSION:-} capacity=${CAPACITY:-on_demand} valid_until=${VALID_UNTIL:-}
network=${NETWORK:-} subnetwork=${SUBNETWORK:-} service_account=${SERVICE_ACCOUNT:-}
env_file=${ENV_FILE:-} create_flags=${CREATE_FLAGS:-} ssh_flags=${SSH_FLAGS:-}
max_restarts=${MAX_RESTARTS:-10} poll=${POLL:-30} grace=${GRACE:-120} patience=${PATIENCE:-20}
dry_run=${DRY_RUN:-} delete='' all=''
[[ $dry_run != 0 ]] || dry_run=''

[[ ${1:-} != -h && ${1:-} != --help ]] || usage 0
(($# >= 1)) || usage 2 >&2
command=$1
shift
while (($#)); do
  case $1 in
    -h | --help) usage 0 ;;
    --delete) delete=1 ;;
    --dry_run) dry_run=1 ;;
    --all) all=1 ;;
    --name=* | --zone=* | --type=* | --slices=* | --project=* | --version=* | --capacity=* | \
      --valid_until=* | --network=* | --subnetwork=* | --service_account=* | --env_file=* | \
      --create_flags=* | --ssh_flags=* | --max_restarts=* | --poll=* | --grace=* | --patience=*)
      setting=${1%%=*}
      printf -v "${setting#--}" %s "${1#*=}"
      ;;
    --)
      shift
      break
      ;;
    *) die "$1 is not a setting; needed: --SETTING=VALUE as --help shows, or -- command" ;;
  esac
  shift
done

[[ $command =~ ^(up|create|status|install|run|logs|stop|delete)$ ]] ||
  die "'$command' is no command; needed: up, create, status, install, run, logs, stop or delete."
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  die "--name is '$name'; needed: small letters, digits and hyphens, such as lumina."
[[ $zone ]] || die "There is no --zone; needed: where the TPUs are, such as us-east5-a."
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices is '$slices'; needed: a number from 1 on."
[[ $patience =~ ^[1-9][0-9]*$ ]] || die "--patience is '$patience'; needed: a number from 1 on."
[[ $max_restarts =~ ^[0-9]+$ ]] || die "--max_restarts is '$max_restarts'; needed: a whole number."
for setting in poll grace; do
  [[ ${!setting} =~ ^[0-9]+(\.[0-9]+)?$ ]] ||
    die "--$setting is '${!setting}'; needed: seconds, such as 30."
done
case $command in
  up | run) (($# >= 1)) || die "There is no command; needed: -- python -m lumina_jax.train ..." ;;
  *) (($# == 0)) || die "'$command' takes no command after --." ;;
esac
[[ ! $delete || $command =~ ^(up|run)$ ]] || die "--delete is for 'up' and 'run', not '$command'."
[[ ! $all || $command == logs ]] || die "--all is for 'logs'; '$command' is always for all hosts."
if [[ $command == up || $command == create ]]; then
  [[ $capacity =~ ^(on_demand|spot|reserved)$ ]] ||
    die "--capacity is '$capacity'; needed: on_demand, spot or reserved."
  case $version:$type in # https://cloud.google.com/tpu/docs/runtimes
    :v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    :v5p-*) version=v2-alpha-tpuv5 ;;
    :v6e-*) version=v2-alpha-tpuv6e ;;
    *:) die "There is no --type; needed: the type of a slice, such as v6e-256." ;;
    :*) die "--type is '$type'; needed: v5litepod-N, v5p-N or v6e-N, or --version as well." ;;
  esac
fi
if [[ $env_file ]]; then
  [[ -f $env_file ]] || die "--env_file is $env_file, which is not there."
  number=0
  while IFS= read -r line || [[ $line ]]; do
    ((++number))
    [[ $line =~ ^[[:space:]]*(#.*)?$ || $line =~ ^[A-Za-z_][A-Za-z0-9_]*= && $line != *$'\r' ]] ||
      die "$env_file, line $number: needed: NAME=value or # a comment." # the line may be a secret
  done <"$env_file"
fi

# Every gcloud of a real run is printed by a dry run, and none is run by it.

exec 3>&1
[[ ! $dry_run ]] || say "Dry run: commands are printed, their answers assumed; nothing is run."
shown() { # command ...
  if [[ ! $dry_run ]]; then
    "$@" </dev/null 8>&- # it asks nobody, and outlives the lock
    return
  fi
  local word line=''
  for word; do
    [[ $word =~ ^[-A-Za-z0-9_./:=,@%+]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }" >&3
}

pause() {
  [[ $dry_run ]] || sleep "$poll" 8>&-
}

location=("--zone=$zone")
[[ -z $project ]] || location+=("--project=$project")
host_script=lumina_jax/launch/tpu_vm_host.sh
read -ra ssh_options <<<"$ssh_flags"
# gcloud tries ten times by itself, so that nobody is there has to be known soon.
ssh_limits=(ConnectTimeout=10 ServerAliveInterval=15 ServerAliveCountMax=4)

queued() { # verb argument ...
  shown gcloud compute tpus queued-resources "$@" "${location[@]}"
}

on_host() { # slice worker command
  queued ssh "$name" --node="$1" --worker="$2" --command="$3" "${ssh_options[@]}" \
    "${ssh_limits[@]/#/--ssh-flag=-o}"
}

# Each slice by itself, all at once: gcloud asks 64 hosts at a time, whatever its --batch-size, and
# after one failure among them no others.
on_hosts() { # command
  local slice processes=() process status=0
  for ((slice = 0; slice < slices; slice++)); do
    on_host "$slice" all "$1" &
    processes+=("$!")
    [[ -z $dry_run ]] || wait "$!" # in order
  done
  for process in "${processes[@]}"; do wait "$process" || status=$?; done
  return "$status"
}

copy_to_hosts() { # file target
  local slice
  for ((slice = 0; slice < slices; slice++)); do
    queued scp "$1" "$name:$2" --node="$slice" --worker=all "${ssh_options[@]}" \
      "${ssh_limits[@]/#/--scp-flag=-o}" || return
  done
}

scratch=$(mktemp -d)
follower=''
stays=''
trap 'end_follower; rm -rf "$scratch"; [[ -z $stays ]] || say "$stays"' EXIT

# Until the end of this script, for `up` and `run`; says at the end what is left.
claim() {
  [[ ! $dry_run ]] || return 0
  local lock=${XDG_RUNTIME_DIR:-/tmp}/lumina_jax-$UID-${project//\//-}-${zone//\//-}-$name.lock
  [[ $(command -v flock) ]] || die "There is no flock here; needed: that of util-linux."
  exec 8>"$lock"
  flock --nonblock 8 ||
    die "Another up or run of $name is at work on this machine; needed: its end (Ctrl-C) first."
  stays="What there is of $name stays, and costs. To give it back:"
  stays+=" launch/tpu_vm.sh delete --name=$name ${location[*]}"
}

give_back() { # after a command that is done
  if [[ $delete ]]; then
    delete
    stays=''
  fi
}

# The queued resource.

dry_state=ACTIVE
[[ $command != up && $command != create ]] || dry_state=ABSENT

resource_state() { # such as ACTIVE; ABSENT if there is none
  local state
  # Not `describe`: what it says of one that is not there looks like any other failure.
  # Quoted: gcloud takes an open parenthesis for one of its own.
  state=$(queued list --filter="name~'(^|/)$name\$'" --format='value(state.state)') || return
  [[ -z $dry_run ]] || state=$dry_state
  echo "${state:-ABSENT}"
}

create() {
  local more flags=("--accelerator-type=$type" "--runtime-version=$version")
  if ((slices > 1)); then
    flags+=("--node-count=$slices" "--node-prefix=$name")
  else
    flags+=("--node-id=$name")
  fi
  [[ $capacity == on_demand ]] || flags+=("--$capacity")
  [[ -z $valid_until ]] || flags+=("--valid-until-duration=$valid_until")
  [[ -z $network ]] || flags+=("--network=$network")
  [[ -z $subnetwork ]] || flags+=("--subnetwork=$subnetwork")
  [[ -z $service_account ]] || flags+=("--service-account=$service_account")
  read -ra more <<<"$create_flags"
  say "Asking for $slices x $type in $zone, $capacity."
  dry_state=ACTIVE
  queued create "$name" "${flags[@]}" "${more[@]}" --async
}

delete() {
  say "Deleting $name and its slices."
  queued delete "$name" --force --quiet
}

# Sets state; returns 1 if it never will be there.
wait_for_resource() {
  local last=''
  while true; do
    if state=$(resource_state); then
      asked=1
      [[ $state == "$last" ]] || say "$name is $state."
      last=$state
      case $state in
        ACTIVE) return 0 ;;
        ABSENT | FAILED | SUSPENDED) return 1 ;;
      esac
    else # at the first time a person is there; later the network may be away for hours
      [[ $asked ]] || die "gcloud cannot tell the state of $name; needed: what it asks for above."
      say "gcloud does not answer; it is asked on."
    fi
    pause
  done
}

# The hosts.

num_hosts=0
find_hosts() { # sets num_hosts; returns 1 if there are none
  local node=$name addresses
  ((slices == 1)) || node=$name-0
  addresses=$(shown gcloud compute tpus tpu-vm describe "$node" "${location[@]}" \
    --format='value(networkEndpoints[].ipAddress)') || return
  [[ -z $dry_run ]] || addresses=dry
  # shellcheck disable=SC2086 # a word for each address
  set -- ${addresses//[;,]/ }
  num_hosts=$((slices * $#))
  ((num_hosts))
}

# Sets states, a line "HOST STATE ATTEMPT" for each host that answers, and num_silent. The status of
# gcloud is no help: it is that of one host of many.
look() {
  local answers
  answers=$(on_hosts "$host_script state" 2>"$scratch/errors" || true)
  [[ -z $dry_run ]] || answers="@host dry 0 $attempt"
  states=$(sed -n 's/^@host //p' <<<"$answers" | sort -u)
  num_silent=$((num_hosts - $(grep -c . <<<"$states" || true)))
  [[ -z $dry_run ]] || num_silent=0
}

hosts_with() { # STATE: their names, of many the first
  awk -v state="$1" '
    $2 == state && ++n <= 4 {names = names " " $1}
    END {print substr(names, 2) (n > 4 ? " and " n - 4 " more" : "")}
  ' <<<"$states"
}

find_commit() { # once: after a preemption the same is installed, whatever is committed meanwhile
  commit=$(git -C "$here/.." rev-parse HEAD) || die "This is no checkout; needed: git clone."
  [[ -z $(git -C "$here/.." status --porcelain) ]] || say "What is not committed stays here."
}

copy_env() {
  [[ -z $env_file ]] || copy_to_hosts "$env_file" .lumina_jax/env
}

# Returns 1 where not every host says that it is done. It keeps .venv: a second time is quick.
install() {
  local tarball=$scratch/checkout.tar.gz unpack answers installed
  look
  [[ -z $(hosts_with running) ]] ||
    die "A run is alive on $(hosts_with running); needed: launch/tpu_vm.sh stop."
  say "Installing commit ${commit:0:12} on $num_hosts host(s)."
  # A host that did not answer just now may run something: its lock knows.
  # shellcheck disable=SC2016 # for the shell there
  unpack='flock --nonblock .lumina_jax/lock true || { echo "error: $(hostname): a run is alive.";'
  unpack+=' exit 1; } >&2; mkdir -p lumina_jax'
  unpack+=' && find lumina_jax -mindepth 1 -maxdepth 1 ! -name .venv'
  unpack+=' -exec rm -rf {} + && tar -xzf .lumina_jax/checkout.tar.gz'
  shown git -C "$here/.." archive --format=tar.gz --prefix=lumina_jax/ --output="$tarball" "$commit"
  on_hosts 'mkdir -p .lumina_jax && chmod 700 .lumina_jax && rm -f .lumina_jax/env' || return 1
  copy_env || return 1
  copy_to_hosts "$tarball" .lumina_jax/checkout.tar.gz || return 1
  # shellcheck disable=SC2016 # for the shell there
  answers=$(on_hosts "$unpack && $host_script install && "'echo "@host $(hostname)"') || return 1
  [[ -z $dry_run ]] || return 0
  installed=$(sed -n 's/^@host //p' <<<"$answers" | sort -u | wc -l)
  ((installed == num_hosts)) || {
    say "$installed of $num_hosts host(s) are installed."
    return 1
  }
}

# The run.

# Prints the log of one host as it grows; after a broken connection it goes on where it was. gcloud
# connects again by itself, with the same command: each answer begins with the line it starts from.
follow() {
  local shown=0 position=0 line last='' began
  until [[ $last =~ ': --- '.*' exit status '[0-9]+$ ]]; do
    began=$SECONDS
    while IFS= read -r line; do
      if [[ $line =~ '@log '([0-9]+)$ ]]; then # what may stand before it was cut off
        position=$((BASH_REMATCH[1] - 1))
      elif ((++position > shown)); then
        echo "$line"
        last=$line shown=$position
      fi
    done < <(on_host 0 0 "$host_script log +$((shown + 1))" 2>/dev/null || true)
    [[ -z $dry_run ]] || return 0
    ((SECONDS - began > 5)) || sleep "$poll"
  done
}

# In a process group of its own, to be ended with what it has started.
start_follower() {
  if [[ $dry_run ]]; then
    follow
    return
  fi
  set -m
  follow 8>&- &
  follower=$!
  set +m
}

await_follower() { # it ends with the log: ten seconds for the last lines
  local tries=100
  while [[ $follower ]] && ((tries--)) && kill -0 "$follower" 2>/dev/null; do sleep 0.1; done
}

end_follower() {
  [[ $follower ]] || return 0
  kill -- "-$follower" 2>/dev/null || true
  wait "$follower" 2>/dev/null || true
  follower=''
}

start_everywhere() { # command ...
  on_hosts "$host_script start $attempt $(printf '%q ' "$@")" >"$scratch/start" 2>&1 || true
}

end_everywhere() { # SIGNAL: to our attempt, or to any
  say "SIG$1 to what still runs: $(hosts_with running)"
  on_hosts "$host_script stop $1 $attempt" >/dev/null 2>&1 || true
}

# Sets outcome, the status of the hosts that have ended which asks for most, and who has it.
judge() {
  local state rank highest=0
  outcome=0 who=''
  while read -r state; do
    case $(verdict "${state/lost/143}") in # lost: the host was started again, a stop from outside
      done) rank=1 ;;
      again) rank=2 ;;
      count) rank=3 ;;
      stop) rank=4 ;;
    esac
    if ((rank > highest)); then
      highest=$rank outcome=${state/lost/143} who=$(hosts_with "$state")
    fi
  done < <(awk '$2 != "running" && $2 != "none" {print $2}' <<<"$states" | sort -u)
}

# Watches one attempt until it has ended on all hosts. Otherwise returns the status to end with, and
# sets gone if it is for want of hosts.
watch() { # command ...
  local silent=0 failed='' told='' others summary last=''
  while true; do
    look
    others=$(awk -v ours="$attempts" '$2 == "running" && !index(ours, $3) {print $1}' <<<"$states")
    if [[ $others ]]; then
      say "Stop: another run or up has started an attempt of its own on ${others//$'\n'/ }." \
        "Needed: one of them alone; this one ends, and ends nothing there."
      return 2
    fi
    if ((num_silent)); then
      say "$num_silent of $num_hosts host(s) do not answer: $(tail -n 1 "$scratch/errors")"
      if ! state=$(resource_state); then
        silent=0 # Google is not reached either: it is this machine, asleep or offline
      elif [[ $state != ACTIVE ]]; then
        gone=1
        return 75
      elif ((++silent == patience)); then
        cat "$scratch/errors" >&2
        say "Stop: no answer in $patience looks, but $name is ACTIVE and the run there may go on." \
          "See what ssh says above (key, firewall); the same call then finds the run again."
        return 1
      fi
    elif [[ $(awk -v id="$attempt" '$3 != id' <<<"$states") ]]; then
      cat "$scratch/start" >&2
      if ! forgive "a start that failed"; then
        end_everywhere TERM
        return 1
      fi
      start_everywhere "$@" # who has begun does not begin again
    else
      silent=0
      summary=$(awk '{print $2}' <<<"$states" | sort | uniq -c | awk '{print $2 " on " $1}')
      [[ $summary == "$last" ]] || say "${summary//$'\n'/, }"
      last=$summary
      [[ $(hosts_with running) ]] || return 0
      judge
      if ((outcome == 0)); then
        failed=''
      elif ((SECONDS - ${failed:=$SECONDS} >= ${grace%.*})); then
        if [[ $told ]]; then
          end_everywhere KILL
          return 0
        fi
        end_everywhere TERM
        told=1 failed=''
      fi
    fi
    pause
  done
}

restarts=0
forgive() { # what: counts it; returns 1 when there were too many
  if ((restarts == max_restarts)); then
    say "Stop: $1, after $restarts counted restart(s), --max_restarts=$max_restarts."
    return 1
  fi
  ((++restarts))
  say "Again: $1 counts, restart $restarts of $max_restarts."
}

show_logs() { # the end of that of the first host that decided
  on_hosts "$host_script log 15" 2>/dev/null | grep "^${who%% *}: " >&2 || true
  say "The whole log is in ~/.lumina_jax/log of each host: launch/tpu_vm.sh logs"
}

# Until it is done; returns its status, and sets gone if there are no hosts for it any more.
run() { # command ...
  local digest alive status
  digest=$(printf '%q ' "$@" | git hash-object --stdin | cut -c1-12)
  gone=''
  trap 'say "The run goes on; the same call finds it again."; exit 130' INT
  look
  alive=$(awk '$2 == "running" {print $3; exit}' <<<"$states")
  case $alive in
    '') ;;
    "$digest"-*) say "It is running already; looking on." ;;
    *) die "Another run is alive on $(hosts_with running); needed: launch/tpu_vm.sh stop." ;;
  esac
  while true; do
    attempt=${alive:-$digest-$(date +%s%N)}
    attempts+=" $attempt"
    [[ $alive ]] || start_everywhere "$@"
    alive=''
    start_follower
    status=0
    watch "$@" || status=$?
    if ((status)); then
      end_follower
      [[ ! $gone ]] || say "The hosts have gone: $name is $state."
      return "$status"
    fi
    await_follower
    end_follower
    judge
    case $(verdict "$outcome") in
      done)
        say "Done: all $num_hosts host(s) ended with 0."
        return 0
        ;;
      stop)
        say "Stop: a person has to mend what ended with $outcome on $who."
        show_logs
        return "$outcome"
        ;;
      again) say "Again: $outcome is a stop from outside and does not count ($who)." ;;
      count)
        forgive "$outcome on $who" || {
          show_logs
          return "$outcome"
        }
        ;;
    esac
    on_hosts "$host_script stop KILL $attempt" >/dev/null 2>&1 || true # what it has left behind
  done
}

# Creates, waits, installs and runs, until it is done.
up() { # command ...
  local status prepare
  while true; do
    until wait_for_resource; do
      if [[ $state == FAILED ]]; then
        queued describe "$name" --format='yaml(state)' >&2 || true
        forgive "a request that failed" || return 1
      fi
      if [[ $state != ABSENT ]] && ! delete; then
        forgive "a deletion that failed" || return 1
      elif ! create; then
        forgive "a request that was refused" || return 1
      fi
      pause
    done
    prepare=install
    if find_hosts; then
      look
      [[ ! $(hosts_with running) ]] || prepare=copy_env
    else
      prepare=false
    fi
    if $prepare; then
      status=0
      run "$@" || status=$?
      [[ $gone ]] || return "$status"
    else
      forgive "hosts that could not be prepared" || return 1
    fi
    pause
  done
}

attempt='' attempts='' asked=''
no_hosts="$name has no hosts; see launch/tpu_vm.sh status."
case $command in
  create) create ;;
  delete) delete ;;
  status)
    state=$(resource_state)
    echo "$name is $state."
    if [[ $state == ACTIVE ]]; then
      find_hosts || die "$no_hosts"
      look
      echo "$states"
      echo "$num_silent of $num_hosts host(s) do not answer."
    fi
    ;;
  install)
    find_commit
    find_hosts || die "$no_hosts"
    install || die "Not installed everywhere; what the hosts say is above. Needed: try again."
    ;;
  run)
    find_hosts || die "$no_hosts"
    look
    ((num_silent < num_hosts)) || die "No host answers; needed: launch/tpu_vm.sh install."
    claim
    copy_env || die "$env_file was not copied; what the hosts say is above. Needed: try again."
    run "$@"
    give_back
    ;;
  logs)
    find_hosts || die "$no_hosts"
    if [[ $all ]]; then
      on_hosts "$host_script log 20"
    else
      follow
    fi
    ;;
  stop)
    find_hosts || die "$no_hosts"
    look
    end_everywhere TERM
    ;;
  up)
    claim
    find_commit
    up "$@"
    give_back
    ;;
esac
