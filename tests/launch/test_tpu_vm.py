"""launch/tpu_vm.sh on a gcloud of folders, whose hosts really run what they are told."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FAKE = ROOT / "tests/launch/fake_gcloud"

# Takes steps like a training: they are counted in the bucket, and a SIGTERM ends it with 75.
WORK = """\
#!/usr/bin/env bash
bucket=$1 num_steps=$2 file=$1/$HOST_NAME
trap 'echo saved; exit 75' TERM
echo "$HOST_NAME" >>"$bucket/starts"
while step=$(cat "$file" 2>/dev/null || echo 0); ((step < num_steps)); do
  [[ ! -f $bucket/enough ]] || break
  if [[ -f $file.fault ]]; then
    echo "a fault at step $step"
    status=$(head -n 1 "$file.fault")
    sed -i 1d "$file.fault"
    [[ -s $file.fault ]] || rm "$file.fault"
    exit "$status"
  fi
  echo "step $step"
  echo $((step + 1)) >"$file"
  sleep 0.03
done
"""

# Makes what `uv venv` makes, and writes down what it would install.
UV = """\
#!/usr/bin/env bash
case $1 in
  venv) mkdir -p .venv/bin ;;
  pip) grep -h . "${@: -1}" >.venv/packages ;;
esac
"""


class Cloud:
    def __init__(self, directory):
        self.root = directory / "cloud"
        self.bucket = directory / "bucket"
        self.checkout = directory / "checkout"
        for folder in (self.root / "bin", self.root / "host_bin", self.bucket):
            folder.mkdir(parents=True)
        script(self.root / "bin/gcloud", f'#!/bin/sh\nexec {sys.executable} -ISs {FAKE} "$@"\n')
        script(self.root / "host_bin/uv", UV)
        script(self.root / "host_bin/hostname", '#!/bin/sh\necho "$HOST_NAME"\n')
        self.make_checkout()
        self.environ = {
            **os.environ,
            "FAKE_GCLOUD": str(self.root),
            "PATH": f"{self.root}/bin:{os.environ['PATH']}",
            "NAME": "lumina", "ZONE": "us-east5-a", "TYPE": "v6e-8", "POLL": "0.1",
            "XDG_RUNTIME_DIR": str(self.root),
        }  # fmt: skip

    def make_checkout(self):
        launch = self.checkout / "launch"
        (launch / "locks").mkdir(parents=True)
        for name in ("cli.sh", "tpu_vm.sh", "tpu_vm_host.sh", "verdict.sh"):
            shutil.copy(ROOT / "launch" / name, launch / name)
        (launch / "locks/build.txt").write_text("pip==1 --hash=sha256:0\n")
        (launch / "locks/tpu.txt").write_text("jax==1 --hash=sha256:0\n")
        script(self.checkout / "work.sh", WORK)
        self.git("init", "-q")
        self.commit()

    def git(self, *arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e")
        subprocess.run(["git", "-C", self.checkout, *identity, *arguments], check=True)

    def commit(self):
        self.git("add", ".")
        self.git("commit", "-qm", "all")

    def start(self, *arguments, **settings):
        return subprocess.Popen(
            [self.checkout / "launch/tpu_vm.sh", *arguments],
            env={**self.environ, **settings}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def call(self, *arguments, status=0, **settings):
        return finish(self.start(*arguments, **settings), status)

    def preempt(self):
        subprocess.run(["gcloud", "preempt", "lumina"], env=self.environ, check=True)

    def calls(self, verb):
        lines = (self.root / "calls.log").read_text().splitlines()
        return [call[4:] for call in map(json.loads, lines) if call[3:4] == [verb]]

    def steps(self):
        return {file.name: int(file.read_text() or 0) for file in self.bucket.glob("t1v-?-?")}

    def starts(self):
        return sorted((self.bucket / "starts").read_text().split())

    def wait_for_step(self, step, num_hosts=2):
        wait_until(lambda: len(self.steps()) == num_hosts and min(self.steps().values()) >= step)

    def wait_for_look_on(self):
        """For a second one that watches the same run."""
        wait_until(lambda: (self.root / "calls.log").read_text().count(" log +1") == 2)

    def on_host(self, name, command):
        host = self.root / "lumina/hosts" / name
        environ = {
            **self.environ, "PATH": f"{self.root}/host_bin:{os.environ['PATH']}",
            "HOME": str(host), "FAKE_HOST": str(host), "HOST_NAME": f"t1v-{name}",
        }  # fmt: skip
        subprocess.run(["bash", "-c", command], cwd=host, check=True, env=environ)

    def kill_all(self):
        for broken in ("offline", "deaf"):
            (self.root / broken).unlink(missing_ok=True)
        if (self.root / "lumina/hosts").exists():
            self.preempt()


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)


def finish(process, status):
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, out + err
    return out, err


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.kill_all()


@pytest.fixture
def slice_(cloud):
    """A slice of two hosts that is there and installed."""
    (cloud.root / "states").write_text("ACTIVE")
    cloud.call("create")
    cloud.call("install")
    return cloud


def work(cloud, num_steps):
    return ("--", "./work.sh", str(cloud.bucket), str(num_steps))


def test_a_run_outlives_a_preemption_on_new_hosts_until_it_is_done(cloud, tmp_path):
    secrets = tmp_path / "secrets"
    secrets.write_text("# mine\n\nTOKEN=secret $(id)\n")
    (cloud.root / "unavailable").write_text("1")
    settings = ("--slices=2", "--capacity=spot", f"--env_file={secrets}", "--service_account=me@x")
    process = cloud.start("up", *settings, *work(cloud, 30))
    cloud.wait_for_step(3, num_hosts=4)
    hosts = cloud.root / "lumina/hosts"
    assert (hosts / "1-1/lumina_jax/.venv/packages").read_text() == "jax==1 --hash=sha256:0\n"
    assert (hosts / "1-1/.lumina_jax/env").read_text() == secrets.read_text()
    script(cloud.checkout / "work.sh", "exit 2\n")
    cloud.commit()
    cloud.preempt()
    out, err = finish(process, 0)

    assert cloud.steps() == {f"t1v-{n}-{k}": 30 for n in (0, 1) for k in (0, 1)}
    assert len(cloud.starts()) == 8
    assert re.search(r"The hosts have gone: lumina is SUSPEND", err)
    assert "lumina is PROVISIONING." in err
    assert "Again: hosts that could not be prepared counts, restart 1 of 10." in err
    assert "Done: all 4 host(s) ended with 0." in err
    assert "To give it back: launch/tpu_vm.sh delete --name=lumina --zone=us-east5-a\n" in err
    shown = {line for line in out.splitlines() if ": step " in line}
    assert shown <= {f"t1v-0-0: step {n}" for n in range(30)}
    assert "t1v-0-0: step 29" in shown
    assert cloud.calls("create") == 2 * [[
        "lumina", "--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e",
        "--node-count=2", "--node-prefix=lumina", "--spot", "--service-account=me@x",
        "--async", "--zone=us-east5-a",
    ]]  # fmt: skip
    assert "secret" not in (cloud.root / "calls.log").read_text().replace(str(secrets), "")

    cloud.call("delete")
    assert not (cloud.root / "lumina").exists()


def test_a_broken_connection_does_not_end_the_run_and_loses_or_repeats_no_line(slice_):
    process = slice_.start("run", "--delete", *work(slice_, 60))
    slice_.wait_for_step(5)
    (slice_.root / "broken").write_text("4")
    out, err = finish(process, 0)
    assert slice_.starts() == ["t1v-0-0", "t1v-0-1"]
    lines = [line for line in out.splitlines() if ": step " in line]
    assert lines == [f"t1v-0-0: step {n}" for n in range(60)]
    assert not (slice_.root / "broken").exists()
    assert not (slice_.root / "lumina").exists()
    assert "To give it back" not in err


def test_slices_that_do_not_answer_are_never_deleted(slice_):
    process = slice_.start("up", "--patience=3", *work(slice_, 1000))
    slice_.wait_for_step(3)
    (slice_.root / "deaf").write_text("0-1")
    _, err = finish(process, 1)
    assert "1 of 2 host(s) do not answer: ssh: Connection timed out" in err
    assert "Stop: no answer in 3 looks, but lumina is ACTIVE and the run there may go on." in err
    assert "To give it back: launch/tpu_vm.sh delete" in err
    assert slice_.calls("delete") == []
    # The run does go on, and the same call finds it.
    (slice_.root / "deaf").unlink()
    process = slice_.start("up", *work(slice_, 1000))
    slice_.wait_for_look_on()
    (slice_.bucket / "enough").touch()
    _, err = finish(process, 0)
    assert "It is running already; looking on." in err
    assert slice_.starts() == ["t1v-0-0", "t1v-0-1"]


def test_a_machine_that_is_offline_for_long_goes_on_when_it_is_back(slice_):
    process = slice_.start("up", "--patience=1", *work(slice_, 1000))
    slice_.wait_for_step(3)
    calls = len(slice_.calls("list"))
    (slice_.root / "offline").touch()
    wait_until(lambda: len(slice_.calls("list")) >= calls + 4)
    (slice_.root / "offline").unlink()
    (slice_.bucket / "enough").touch()
    _, err = finish(process, 0)
    assert "2 of 2 host(s) do not answer: ERROR: (gcloud) Unable to find the server" in err
    assert slice_.starts() == ["t1v-0-0", "t1v-0-1"]
    assert slice_.calls("delete") == []


def test_nothing_is_installed_under_what_still_runs(slice_):
    slice_.call("run", "--", "sh", "-c", "sleep 100 &")
    before = slice_.root / "lumina/hosts/0-1/lumina_jax/work.sh"
    before.write_text("as it was")
    _, err = slice_.call("install", status=2)
    assert "error: t1v-0-1: a run is alive." in err
    assert before.read_text() == "as it was"


def test_offline_at_the_start_is_said_at_once(cloud):
    (cloud.root / "offline").touch()
    _, err = cloud.call("up", *work(cloud, 1), status=2)
    assert "gcloud cannot tell the state of lumina" in err


def test_of_two_that_start_the_same_run_one_ends_and_ends_nothing(slice_):
    process = slice_.start("up", *work(slice_, 1000))
    slice_.wait_for_step(3)
    _, err = slice_.call("run", *work(slice_, 1000), status=2)
    assert "Another up or run of lumina is at work on this machine" in err
    # Another machine's, between two looks of this one.
    process.send_signal(signal.SIGSTOP)
    for host in ("0-0", "0-1"):
        there = "lumina_jax/launch/tpu_vm_host.sh"
        slice_.on_host(
            host, f"{there} stop KILL; {there} start other ./work.sh {slice_.bucket} 1000"
        )
    process.send_signal(signal.SIGCONT)
    _, err = finish(process, 2)
    assert "another run or up has started an attempt of its own on t1v-0-0 t1v-0-1" in err
    slice_.on_host("0-0", f"{there} stop KILL mine")
    assert re.search(r"t1v-0-0 running other\nt1v-0-1 running other", slice_.call("status")[0])


@pytest.mark.slow
def test_two_machines_with_one_command_destroy_nothing(slice_, tmp_path):
    processes = []
    for machine in ("a", "b"):
        (tmp_path / machine).mkdir()
        processes.append(
            slice_.start(
                "up", "--grace=0", *work(slice_, 1000), XDG_RUNTIME_DIR=str(tmp_path / machine)
            )
        )
        slice_.wait_for_step(3)
    slice_.wait_for_look_on()
    (slice_.bucket / "t1v-0-0.fault").write_text("75\n")
    wait_until(lambda: any(process.poll() is not None for process in processes))
    (slice_.bucket / "enough").touch()
    statuses = [process.communicate(timeout=60) and process.returncode for process in processes]
    assert sorted(statuses) in ([0, 2], [2, 2])
    assert slice_.calls("delete") == []
    assert len(slice_.calls("create")) == 1


def test_a_start_that_keeps_failing_is_counted(slice_):
    # As on a full disk: nothing can be written down.
    (slice_.root / "lumina/hosts/0-1/.lumina_jax/session").mkdir(parents=True)
    _, err = slice_.call("up", "--max_restarts=1", *work(slice_, 1000), status=1)
    assert "error: t1v-0-1: the run has not begun; is the disk full?" in err
    assert "Stop: a start that failed, after 1 counted restart(s), --max_restarts=1." in err
    assert "SIGTERM to what still runs: t1v-0-0" in err
    assert len(slice_.calls("create")) == 1
    assert slice_.calls("delete") == []


@pytest.mark.slow
def test_a_host_that_answers_late_is_started_late(cloud):
    (cloud.root / "states").write_text("ACTIVE")
    cloud.call("create", "--slices=2")
    cloud.call("install", "--slices=2")
    (cloud.root / "deaf").write_text("0-1")
    process = cloud.start("run", "--slices=2", *work(cloud, 50))
    wait_until(lambda: cloud.calls("list"))
    assert set(cloud.starts()) == {"t1v-0-0", "t1v-1-0", "t1v-1-1"}
    (cloud.root / "deaf").unlink()
    finish(process, 0)
    assert len(cloud.starts()) == 4


def test_the_environment_is_taken_as_it_is_and_removed_by_an_install_without(slice_, tmp_path):
    secrets = tmp_path / "secrets"
    secrets.write_text('# mine\nTOKEN=$(id) "a" #b\n')
    slice_.call("run", f"--env_file={secrets}", "--", "sh", "-c", "echo token $TOKEN")
    assert 't1v-0-1: token $(id) "a" #b\n' in slice_.call("logs", "--all")[0]
    slice_.call("install")
    assert not (slice_.root / "lumina/hosts/0-1/.lumina_jax/env").exists()


@pytest.mark.parametrize("line", ["export A=1", "a word", "A =1", "A=1\r"], ids=str.strip)
def test_what_is_no_variable_is_refused_and_not_shown(cloud, tmp_path, line):
    secrets = tmp_path / "secrets"
    secrets.write_bytes(f"A=1\n{line}".encode())
    _, err = cloud.call("install", f"--env_file={secrets}", status=2)
    assert f"error: {secrets}, line 2: needed: NAME=value or # a comment." in err
    assert not (cloud.root / "calls.log").exists()


@pytest.mark.slow
def test_a_connection_that_breaks_at_the_start_starts_nobody_twice(slice_):
    process = slice_.start("run", *work(slice_, 20))
    wait_until(lambda: len(slice_.calls("ssh")) >= 5)  # two of `install`, two looks, the start
    finish(process, 0)
    started = [call for call in slice_.calls("ssh") if " start " in " ".join(call)]
    command = next(word for word in started[0] if word.startswith("--command="))
    for host in 2 * ["0-0", "0-1"]:
        slice_.on_host(host, command.removeprefix("--command="))
    assert slice_.starts() == ["t1v-0-0", "t1v-0-1"]


def test_what_a_person_has_to_mend_stops_it_and_says_which_host_said_what(slice_):
    (slice_.bucket / "t1v-0-1.fault").write_text("2\n")
    _, err = slice_.call("run", "--grace=0", *work(slice_, 1000), status=2)
    assert "Stop: a person has to mend what ended with 2 on t1v-0-1." in err
    assert "t1v-0-1: a fault at step 0" in err
    assert "SIGTERM to what still runs: t1v-0-0" in err
    assert len(slice_.starts()) == 2
    log = slice_.root / "lumina/hosts/0-0/.lumina_jax/log"
    assert "saved" in log.read_text()


@pytest.mark.slow
def test_faults_count_and_stops_from_outside_do_not(slice_):
    (slice_.bucket / "t1v-0-0.fault").write_text("75\n143\n1\n75\n1\n")
    _, err = slice_.call("run", "--max_restarts=1", "--grace=0", *work(slice_, 1000), status=1)
    assert "Again: 75 is a stop from outside and does not count (t1v-0-0" in err
    assert "Again: 1 on t1v-0-0 counts, restart 1 of 1." in err
    assert "Stop: 1 on t1v-0-0, after 1 counted restart(s), --max_restarts=1." in err
    assert slice_.starts().count("t1v-0-0") == 5


@pytest.mark.slow
def test_a_host_that_was_started_again_lets_all_start_anew(slice_):
    process = slice_.start("run", "--grace=0", *work(slice_, 40))
    slice_.wait_for_step(3)
    home = slice_.root / "lumina/hosts/0-1/.lumina_jax"
    session = (home / "session").read_text().strip()
    subprocess.run(["pkill", "-KILL", "--session", session], check=True)
    _, err = finish(process, 0)
    assert "lost on 1" in err
    assert "is a stop from outside and does not count" in err
    assert slice_.steps() == {"t1v-0-0": 40, "t1v-0-1": 40}


@pytest.mark.slow
def test_who_calls_again_looks_on_at_the_run_that_is_there(slice_):
    process = slice_.start("run", *work(slice_, 1000))
    slice_.wait_for_step(3)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, 130)
    assert "The run goes on" in err
    _, err = slice_.call("run", "--", "./work.sh", "elsewhere", "1", status=2)
    assert "Another run is alive on t1v-0-0 t1v-0-1; needed: launch/tpu_vm.sh stop." in err
    _, err = slice_.call("install", status=2)
    assert "A run is alive on t1v-0-0 t1v-0-1; needed: launch/tpu_vm.sh stop." in err
    process = slice_.start("up", *work(slice_, 1000))
    slice_.wait_for_look_on()
    (slice_.bucket / "enough").touch()
    out, err = finish(process, 0)
    assert "It is running already; looking on." in err
    assert "t1v-0-0: step 0\n" in out
    assert slice_.starts() == ["t1v-0-0", "t1v-0-1"]


@pytest.mark.slow
def test_a_run_is_stopped_and_its_state_and_log_are_shown(slice_):
    process = slice_.start("run", *work(slice_, 1000))
    slice_.wait_for_step(3)
    process.send_signal(signal.SIGINT)
    finish(process, 130)
    out, _ = slice_.call("status")
    assert re.search(r"^lumina is ACTIVE.\nt1v-0-0 running \S+\nt1v-0-1 running", out)
    slice_.call("stop")
    wait_until(lambda: "t1v-0-1 75 " in slice_.call("status")[0])
    out, _ = slice_.call("logs")
    assert out.startswith("t1v-0-0: --- ")
    assert "t1v-0-0: saved\n" in out
    out, _ = slice_.call("logs", "--all")
    assert {"t1v-0-0: saved", "t1v-0-1: saved"} <= set(out.splitlines())


@pytest.mark.slow
def test_requests_that_fail_are_counted(cloud):
    (cloud.root / "states").write_text("WAITING_FOR_RESOURCES FAILED")
    _, err = cloud.call("up", "--max_restarts=2", *work(cloud, 1), status=1)
    assert "Again: a request that failed counts, restart 2 of 2." in err
    assert "Stop: a request that failed, after 2 counted restart(s)" in err
    assert len(cloud.calls("create")) == 3


def test_a_dry_run_prints_every_command_and_runs_none(cloud):
    out, _ = cloud.call(
        "up", "--dry_run", "--capacity=reserved", "--network=n", "--subnetwork=s",
        "--valid_until=6h", "--create_flags=--internal-ips", "--ssh_flags=--tunnel-through-iap",
        "--project=p", "--", "python", "-m", "lumina_jax.train", "--note=two words",
    )  # fmt: skip
    assert not (cloud.root / "calls.log").exists()
    lines = out.splitlines()
    queued = "gcloud compute tpus queued-resources"
    assert (
        f"{queued} create lumina --accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv6e "
        f"--node-id=lumina --reserved --valid-until-duration=6h --network=n --subnetwork=s "
        f"--internal-ips --async --zone=us-east5-a --project=p"
    ) in lines
    verbs = [re.sub(r" (lumina|'--filter).*", "", line) for line in lines]
    assert verbs[:3] == [f"{queued} list", f"{queued} create", f"{queued} list"]
    assert sum(line.startswith("git ") for line in lines) == 1
    copies = [line for line in lines if line.startswith(f"{queued} scp")]
    assert len(copies) == 1
    assert "--worker=all --tunnel-through-iap --scp-flag=-oConnectTimeout=10 " in copies[0]
    (start,) = (line for line in lines if " start " in line)
    # Quoted for the shell here, and in it for the shell there.
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {start}"], text=True, stdout=subprocess.PIPE, check=True
    ).stdout.splitlines()
    command = next(word for word in words if word.startswith("--command="))
    assert command.endswith(r"python -m lumina_jax.train --note=two\ words ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "'fly' is no command"),
        (["create", "--name=Big One"], "--name is 'Big One'"),
        (["create", "--zone="], "There is no --zone"),
        (["create", "--type="], "There is no --type"),
        (["create", "--type=v4-8"], "--type is 'v4-8'"),
        (["create", "--capacity=cheap"], "--capacity is 'cheap'"),
        (["create", "--slices=0"], "--slices is '0'"),
        (["create", "--colour=red"], "--colour=red is not a setting"),
        (["create", "--poll=soon"], "--poll is 'soon'"),
        (["create", "--patience=0"], "--patience is '0'"),
        (["create", "--delete"], "--delete is for 'up' and 'run', not 'create'"),
        (["create", "--max_restarts=some"], "--max_restarts is 'some'"),
        (["create", "--env_file=nowhere"], "--env_file is nowhere, which is not there"),
        (["create", "--", "python"], "'create' takes no command"),
        (["run"], "There is no command"),
        (["status", "--all"], "--all is for 'logs'"),
        ([], "launch/tpu_vm.sh COMMAND [setting ...]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_call_is_told_what_was_needed(cloud, arguments, message):
    _, err = cloud.call(*arguments, status=2)
    assert message in err
    assert not (cloud.root / "calls.log").exists()


@pytest.mark.slow
def test_hosts_without_the_checkout_are_not_run_on(cloud):
    (cloud.root / "states").write_text("ACTIVE")
    cloud.call("create")
    _, err = cloud.call("run", *work(cloud, 1), status=2)
    assert "No host answers; needed: launch/tpu_vm.sh install." in err


def test_help_has_an_example():
    for name in ("tpu_vm.sh", "tpu_vm_host.sh"):
        shown = subprocess.run(
            [ROOT / "launch" / name, "--help"], text=True, stdout=subprocess.PIPE, check=True
        ).stdout
        assert "python -m lumina_jax.train" in shown
        assert "set -euo" not in shown
