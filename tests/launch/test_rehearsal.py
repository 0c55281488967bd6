"""launch/local.sh: processes of this machine, started, ended and started again as by a JobSet."""

import contextlib
import os
import pathlib
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from lumina_jax import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
OWN = "JAX_PLATFORMS"  # CPUs here; a host of a JobSet has its own chips


def start(tmp_path, *arguments, **environment):
    environment = {
        **os.environ,
        "WORKDIR": str(tmp_path),
        "PYTHON": sys.executable,
        "JAX_COMPILATION_CACHE_DIR": os.environ["LUMINA_JAX_TEST_CACHE"],
        **environment,
    }
    return subprocess.Popen(
        ["launch/local.sh", *map(str, arguments)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def finish(process, status, timeout=60):
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == status, output
    return output


def run(tmp_path, num_processes, script, status=0, **environment):
    """What is printed when each process runs this script of bash, $1 is a folder for all."""
    command = ("bash", "-c", script, "bash", tmp_path)
    return finish(start(tmp_path, num_processes, "--", *command, **environment), status)


def wait_for(holds, timeout=20.0):
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(path):
    """Whether a process lives whose id is in this file; a zombie does not."""
    try:
        stat = pathlib.Path(f"/proc/{path.read_text().strip()}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def events(tmp_path):
    lines = (tmp_path / "logs/events.log").read_text().splitlines()
    return [line.partition(" ")[2] for line in lines]


def test_each_process_has_the_variables_of_a_pod(tmp_path):
    """The manifest names all but JOB_COMPLETION_INDEX, which Kubernetes sets."""
    script = 'env | grep -E "^JAX_|^JOB_" >$1/env.$JAX_PROCESS_ID; echo "XLA $XLA_FLAGS"'
    output = run(tmp_path, 3, script, DEVICES="2")
    found = [
        dict(line.split("=", 1) for line in (tmp_path / f"env.{k}").read_text().splitlines())
        for k in range(3)
    ]
    for number, variables in enumerate(found):
        assert variables["JAX_PROCESS_ID"] == variables["JOB_COMPLETION_INDEX"] == str(number)
        assert variables["JAX_NUM_PROCESSES"] == "3"
        assert variables["JAX_COORDINATOR_ADDRESS"] == found[0]["JAX_COORDINATOR_ADDRESS"]
    assert output.count("--xla_force_host_platform_device_count=2\n") == 3

    manifests = yaml.safe_load_all((ROOT / "tests/launch/golden/h100.yaml").read_text())
    stage = next(manifest for manifest in manifests if manifest["kind"] == "JobSet")
    (job,) = stage["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    named = {variable["name"] for variable in container["env"]}
    pod = {name for name in named if name.startswith("JAX_")} | {"JOB_COMPLETION_INDEX"}
    assert set(found[0]) == pod | {OWN}


def test_lines_have_the_number_of_their_process_and_are_kept(tmp_path):
    output = run(tmp_path, 2, 'echo "I am $JAX_PROCESS_ID"; printf "no end" >&2')
    for number in range(2):
        assert f"[{number}] I am {number}\n" in output
        assert f"[{number}] no end" in output
        kept = (tmp_path / f"logs/1.{number}.log").read_text()
        assert kept == f"I am {number}\nno end"
    assert output.endswith("[local] Done: all ended with 0 after 1 start(s).\n")


@pytest.mark.parametrize("status", [2, 130])
def test_what_needs_a_person_stops_all(tmp_path, status):
    script = f"((JAX_PROCESS_ID == 1)) && exit {status}; exec sleep 100"
    output = run(tmp_path, 2, script, status)
    assert f"Stop: a person has to mend what ended with {status}." in output
    assert f"Process 1 ended with {status}." in events(tmp_path)
    assert "Process 0 ended with 143." in events(tmp_path)  # it was terminated


@pytest.mark.parametrize("status", [75, 143])
def test_stops_from_outside_are_not_counted(tmp_path, status):
    script = f"""
    ((JAX_PROCESS_ID == 1)) || exec sleep 1
    echo x >>$1/starts
    (($(wc -l <$1/starts) > 3)) || exit {status}"""
    run(tmp_path, 2, script, MAX_RESTARTS="0")
    assert events(tmp_path).count(
        f"Again: {status} is a stop from outside and does not count."
    ) == 3  # fmt: skip
    addresses = re.findall(r"listens at (\S+)\.", "\n".join(events(tmp_path)))
    assert len(addresses) == 4
    assert len(set(addresses)) > 1  # each start has a port of its own


@pytest.mark.parametrize("end", ["exit 1", "exit 134", "kill -KILL $$", "kill -ABRT $$"])
def test_faults_are_forgiven_so_many_times(tmp_path, end):
    status = {"exit 1": 1, "exit 134": 134, "kill -KILL $$": 137, "kill -ABRT $$": 134}[end]
    script = f"ulimit -c 0; ((JAX_PROCESS_ID == 1)) || exec sleep 100; {end}"
    output = run(tmp_path, 2, script, status, MAX_RESTARTS="1")
    assert f"Again: {status} counts, restart 1 of 1." in output
    assert f"Stop: {status} after 1 counted restart(s), MAX_RESTARTS=1." in output
    assert "JAX_NUM_PROCESSES" not in output  # bash would tell of each that is killed


def test_no_start_begins_before_all_of_the_last_is_gone(tmp_path):
    """Process 0 does not listen to SIGTERM, nor does what it started in another process group."""
    script = """
    if ((JAX_PROCESS_ID == 1)); then
      [[ ! -e $1/told ]] || exit 0
      until [[ -e $1/child ]]; do sleep 0.1; done
      touch $1/told
      exit 75
    fi
    if [[ -e $1/told ]]; then # the second start; a zombie is gone
      ps -o stat= -p "$(<$1/child)" | grep -v Z && exit 2
      exit 0
    fi
    trap "" TERM
    set -m
    sleep 100 & echo $! >$1/child
    wait"""
    run(tmp_path, 2, script, GRACE="1")
    assert "SIGKILL to process(es) 0: not gone 1 s after SIGTERM." in events(tmp_path)
    assert "Process 0 ended with 137." in events(tmp_path)


def test_what_a_process_leaves_behind_is_killed(tmp_path):
    run(tmp_path, 1, "sleep 100 & echo $! >$1/child")
    assert not is_alive(tmp_path / "child")


SAVING = """
trap 'sleep 0.2; touch $1/saved.$JAX_PROCESS_ID; exit 75' TERM
touch $1/ready.$JAX_PROCESS_ID
echo $$ >$1/pid.$JAX_PROCESS_ID
while true; do sleep 0.1; done"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=["term", "int"]
)
def test_a_signal_lets_all_save_and_ends_it(tmp_path, number, status):
    process = start(tmp_path, 2, "bash", "-c", SAVING, "bash", tmp_path)
    wait_for(lambda: all((tmp_path / f"ready.{k}").exists() for k in range(2)))
    process.send_signal(number)
    finish(process, status)
    assert all((tmp_path / f"saved.{k}").exists() for k in range(2))
    assert len([line for line in events(tmp_path) if line.startswith("Start")]) == 1


def test_a_second_signal_kills(tmp_path):
    script = 'trap "" TERM; echo $$ >$1/pid.$JAX_PROCESS_ID; while true; do sleep 0.1; done'
    process = start(tmp_path, 2, "bash", "-c", script, "bash", tmp_path)
    pids = [tmp_path / f"pid.{k}" for k in range(2)]
    wait_for(lambda: all(path.exists() for path in pids))
    process.send_signal(signal.SIGINT)
    wait_for(lambda: any("Told to end" in line for line in events(tmp_path)))
    process.send_signal(signal.SIGINT)
    finish(process, 130)
    assert not any(map(is_alive, pids))


def test_processes_save_when_the_script_itself_is_killed(tmp_path):
    process = start(tmp_path, 2, "bash", "-c", SAVING, "bash", tmp_path)
    wait_for(lambda: all((tmp_path / f"pid.{k}").exists() for k in range(2)))
    process.kill()
    process.communicate(timeout=20)
    wait_for(lambda: all((tmp_path / f"saved.{k}").exists() for k in range(2)))
    wait_for(lambda: not any(is_alive(tmp_path / f"pid.{k}") for k in range(2)))


def test_a_wrong_call_is_told_what_is_needed(tmp_path):
    def told(*arguments, **environment):
        return finish(start(tmp_path, *arguments, **environment), 2)

    assert "launch/local.sh N [--] [command ...]" in told()
    assert "N is 'two'; needed: a whole number from 1 on" in told("two", "true")
    assert "N is '0'" in told(0)
    assert "DEVICES is '0'" in told(2, "true", DEVICES="0")
    assert "GRACE is '-1'" in told(2, "true", GRACE="-1")
    assert "MAX_RESTARTS is 'no'" in told(2, "true", MAX_RESTARTS="no")
    assert "'/no/program' is not a program" in told(2, "/no/program")
    assert "KILL is '2'; needed: a process from 0 to 1, or none" in told(2, KILL="2")
    assert "PREEMPT is 'x'" in told(2, PREEMPT="x")
    assert "PYTHON=/no/python is not a program" in told(2, PYTHON="/no/python")
    assert "LOST_TIMEOUT is 'soon'; needed: seconds" in told(2, LOST_TIMEOUT="soon")
    assert "WORKDIR is '/proc/x'; needed: a folder" in told(2, WORKDIR="/proc/x")
    assert "WORKDIR is '/proc/x'; needed: a folder" in told(2, "true", WORKDIR="/proc/x")
    assert "'--config=x' is not a program" in told(2, "--config=x")
    assert "Ctrl-C (130)" in finish(start(tmp_path, "--help"), 0)


def test_processes_that_lost_one_join_at_the_next_start(tmp_path):
    """There twice, one program after another at one port, as stages do."""
    script = """
    if [[ ! -e $1/killed ]] && ((JAX_PROCESS_ID == 1)); then touch $1/killed; kill -KILL $$; fi
    $PYTHON tests/joining.py && $PYTHON tests/joining.py"""
    output = run(tmp_path, 2, script, PYTHONPATH=str(ROOT))
    assert "Process 1 ended with 137." in events(tmp_path)
    assert "Again: 137 counts, restart 1 of 10." in output
    for number in range(2):
        said = (tmp_path / f"logs/2.{number}.log").read_text()
        assert said.count("sum over 2 processes: 3") == 2


@pytest.mark.slow
def test_a_rehearsal_learns_what_a_run_without_stops_learns(tmp_path):
    relative = os.path.relpath(tmp_path, ROOT)  # as the default is
    output = finish(start(tmp_path, 2, WORKDIR=relative), 0, timeout=900)
    assert output.endswith("The rehearsal went well.\n")
    assert "  ok        Process 1 was killed in stage 2, which counts.\n" in output
    assert "  ok        The others noticed it and ended with 75.\n" in output
    assert "  ok        All ended with 0 after 3 start(s).\n" in output
    assert max(len(line) for line in output.splitlines() if line.startswith("[")) <= 100
    output = finish(start(tmp_path, 2, KILL="none", PREEMPT="none"), 0, timeout=900)
    assert "  ok        All ended with 0 after 1 start(s).\n" in output

    stopped, calm = sorted(path for path in tmp_path.iterdir() if path.name[0].isdigit())
    for stage in ("stage1", "stage2", "stage3"):
        found, expected = (checkpoint.find(run / stage) for run in (stopped, calm))
        assert found.name == expected.name
        assert checkpoint.load_digest(found)["arrays"] == checkpoint.load_digest(expected)["arrays"]
        assert checkpoint.load_data(found) == checkpoint.load_data(expected)


@pytest.mark.slow
def test_a_rehearsal_in_which_nobody_could_be_killed_has_failed(tmp_path):
    """The processes cannot even begin."""
    process = start(tmp_path, 1, XLA_FLAGS="--no_such_flag", MAX_RESTARTS="0")
    output = finish(process, 1, timeout=120)
    assert "  WRONG     Process 0 was killed in stage 2, which counts.\n" in output
    assert "The rehearsal has failed: 10 of what should be is not." in output


def at_a_terminal(tmp_path, *arguments, ready):
    """Output and status of launch/local.sh in a session of its own, after Ctrl-C when `ready`."""
    control, terminal = pty.openpty()
    environment = {**os.environ, "WORKDIR": str(tmp_path), "PYTHON": sys.executable}
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", "launch/local.sh", *map(str, arguments)],
        cwd=ROOT, env=environment, stdin=terminal, stdout=terminal, stderr=terminal,
    )  # fmt: skip
    os.close(terminal)
    output = b""
    while not ready(output):
        output += os.read(control, 4096)
    os.write(control, b"\x03")
    with contextlib.suppress(OSError):  # that is how a terminal ends
        while part := os.read(control, 4096):
            output += part
    os.close(control)
    return output.decode(), process.wait(timeout=60)


def test_ctrl_c_at_a_terminal_lets_all_save(tmp_path):
    script = SAVING.replace("while true", "echo begun; while true")
    output, status = at_a_terminal(
        tmp_path, 2, "bash", "-c", script, "bash", tmp_path,
        ready=lambda output: output.count(b"begun") == 2,
    )  # fmt: skip
    assert status == 130
    assert "Process 0 ended with 75." in events(tmp_path)
    assert "Process 1 ended with 75." in events(tmp_path)
    assert all((tmp_path / f"saved.{k}").exists() for k in range(2))
    assert "Killed" not in output


@pytest.mark.slow
def test_ctrl_c_at_a_terminal_ends_a_rehearsal(tmp_path):
    output, status = at_a_terminal(tmp_path, 2, ready=lambda output: b"[1] Stage 1 of 3" in output)
    assert status == 130
    assert "Told to end" in output
    assert "SIGKILL to process" not in output
    assert "Ended by a signal; logs are in" in output
