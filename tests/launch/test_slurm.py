"""launch/slurm.sbatch: with commands of SLURM that only write down, and in a small SLURM."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TRAIN = ("--config=configs/tiny.py", "--workdir=/shared/run")

# Each writes down how it was called; srun ends with the next status of a list.
SRUN = """\
#!/usr/bin/env bash
printf '%s\\n' "$@" >srun.args
echo "$PYTHON" >srun.python
if [[ -f wait ]]; then touch waiting; sleep 1; fi
status=$(head -n 1 statuses)
sed -i 1d statuses
exit "$status"
"""
SCONTROL = """\
#!/usr/bin/env bash
echo "$*" >>scontrol.calls
[[ ! -f refuse ]]
"""


@pytest.fixture
def job(tmp_path):
    """A checkout to submit in, with what SLURM tells a job."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "launch").mkdir()
    for name in ("slurm.sbatch", "verdict.sh"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "launch" / name)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def start(job, *arguments, **environment):
    # SLURM runs a copy from its own folder.
    copy = shutil.copy(job / "launch/slurm.sbatch", job / "slurm_script")
    given = {
        "PATH": f"{job}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "77",
        "SLURM_SUBMIT_DIR": str(job), "SLURM_JOB_NUM_NODES": "4", "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_ON_NODE": "208",
    }  # fmt: skip
    given = {name: value for name, value in (given | environment).items() if value is not None}
    return subprocess.Popen(
        [copy, *arguments], cwd=job, env=given, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(job, statuses, *arguments, status, **environment):
    (job / "statuses").write_text("".join(f"{n}\n" for n in statuses))
    process = start(job, *(arguments or TRAIN), **environment)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == status, output
    return output


def srun_arguments(job):
    return (job / "srun.args").read_text().splitlines()


def requeued(job):
    calls = job / "scontrol.calls"
    return calls.read_text().splitlines() if calls.exists() else []


def test_each_gpu_of_each_node_has_a_process_that_sees_all_gpus(job):
    run(job, [0], status=0)
    arguments = srun_arguments(job)
    command = arguments.index(".venv/bin/python")
    assert {"--nodes=4", "--ntasks=32", "--ntasks-per-node=8", "--cpus-per-task=26"} < {*arguments}
    # JAX picks the GPU by the number of the task on its node: SLURM must not hide the others.
    assert not [word for word in arguments[:command] if "gpu" in word]
    assert arguments[command:] == [".venv/bin/python", "-m", "lumina_jax.train", *TRAIN]


def test_another_command_and_number_of_processes_are_taken(job):
    run(job, [0], "launch/stages.sh", "/runs", "a b", status=0, TASKS_PER_NODE="2")
    assert "--ntasks=8" in srun_arguments(job)
    assert srun_arguments(job)[-3:] == ["launch/stages.sh", "/runs", "a b"]
    assert (job / "srun.python").read_text() == ".venv/bin/python\n"
    run(job, [0], status=0, SLURM_GPUS_ON_NODE=None, PYTHON="python3")
    assert "--ntasks-per-node=1" in srun_arguments(job)
    assert "python3" in srun_arguments(job)


def test_a_container_is_run_by_pyxis_or_apptainer(job):
    run(job, [0], status=0, CONTAINER="registry#lumina:1", MOUNTS="/shared:/shared")
    arguments = srun_arguments(job)
    assert arguments[-8:] == [
        "--container-image=registry#lumina:1", "--container-workdir=/app",
        "--container-mounts=/shared:/shared", "python", "-m", "lumina_jax.train", *TRAIN,
    ]  # fmt: skip
    run(job, [0], status=0, CONTAINER="lumina.sif", MOUNTS="/shared:/shared")
    assert srun_arguments(job)[-13:] == [
        "apptainer", "exec", "--nv", "--pwd", "/app", "--bind", "/shared:/shared", "lumina.sif",
        "python", "-m", "lumina_jax.train", *TRAIN,
    ]  # fmt: skip
    assert (job / "srun.python").read_text() == "python\n"  # what stages.sh starts


@pytest.mark.parametrize("status", [2, 130])
def test_what_a_person_has_to_mend_ends_the_job(job, status):
    output = run(job, [status], status=status)
    assert f"Stop: a person has to mend what ended with {status}." in output
    assert not requeued(job)


@pytest.mark.parametrize("status", [75, 143])
def test_a_stop_from_outside_queues_the_job_again_and_does_not_count(job, status):
    for _ in range(3):
        run(job, [status], status=0, MAX_RESTARTS="0")
    assert requeued(job) == ["requeue 77"] * 3
    assert not (job / "slurm-77.failures").exists()


def test_faults_of_the_program_are_forgiven_as_often_as_asked(job):
    for status in (1, 134):
        output = run(job, [status], status=0, MAX_RESTARTS="2")
        assert f"Again: {status} counts, restart" in output
    run(job, [75], status=0, MAX_RESTARTS="2")
    output = run(job, [1], status=1, MAX_RESTARTS="2")
    assert "Stop: 1 after 2 counted restart(s), MAX_RESTARTS=2." in output
    assert requeued(job) == ["requeue 77"] * 3
    lines = (job / "slurm-77.failures").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["1", "134", "1"]


def test_a_job_that_slurm_ends_waits_for_its_tasks_and_is_not_queued_again(job):
    (job / "wait").touch()
    (job / "statuses").write_text("75\n")
    process = start(job, *TRAIN)
    while not (job / "waiting").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "Ended by SLURM, with 75." in output
    assert not requeued(job)


def test_a_job_that_cannot_be_queued_again_says_so(job):
    (job / "refuse").touch()
    assert "SLURM does not queue the job again" in run(job, [75], status=2)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_JOB_ID": None}, "This is not a job of SLURM. Submit it: sbatch"),
        ({"SLURM_SUBMIT_DIR": "/"}, "/ has no launch/verdict.sh"),
        ({"TASKS_PER_NODE": "all"}, "TASKS_PER_NODE is 'all'"),
        ({"TASKS_PER_NODE": "209"}, "209 processes share 208 CPUs"),
        ({"MAX_RESTARTS": "few"}, "MAX_RESTARTS is 'few'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_call_is_told_what_was_needed(job, environment, message):
    assert message in run(job, [0], status=2, **environment)
    assert not (job / "srun.args").exists()


def test_what_sbatch_reads_lets_tasks_save_and_the_job_come_again(job):
    text = (job / "launch/slurm.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", text, re.MULTILINE))
    # Without "B:" it goes to the tasks. The log of the starts before is kept.
    assert asked["signal"] == "TERM@300"
    assert asked["requeue"] == ""
    assert asked["open-mode"] == "append"
    # sbatch reads no line after the first command.
    assert text.rindex("\n#SBATCH") < text.index("\nset -euo pipefail")
    assert "sbatch --nodes=4" in run(job, [0], "--help", status=0)


# A SLURM of two nodes on this machine.

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/ctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmctldLogFile={directory}/ctld.log
SlurmdLogFile={directory}/%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
KillWait=20
NodeName=127.0.0.1 NodeHostName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=127.0.0.2 NodeHostName={host} NodeAddr=127.0.0.2 Port={ports[2]} CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

# Saves for two seconds when it is told to end; a second SIGTERM would be written down.
TASK = """\
import os, pathlib, signal, sys, time
task, told = os.environ["SLURM_PROCID"], []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
print("task", task, "of", os.environ["SLURM_NTASKS"], flush=True)
while not told:
    if pathlib.Path("enough").exists():
        sys.exit(int(sys.argv[1]))
    time.sleep(0.05)
time.sleep(2)
print("saved after", len(told), flush=True)
sys.exit(75)
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def slurm(job, monkeypatch):
    """Submits in a SLURM of its own; `slurm("squeue", ...)` asks it."""
    missing = [name for name in ("slurmctld", "slurmd", "munged") if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and slurm-wlm; missing: {', '.join(missing) or 'root'}")
    directory = pathlib.Path(tempfile.mkdtemp(prefix="slurm_"))  # a short path, for a socket
    for name in ("state", "spool-127.0.0.1", "spool-127.0.0.2"):
        (directory / name).mkdir()
    config = directory / "slurm.conf"
    host = socket.gethostname()
    config.write_text(CONFIG.format(directory=directory, host=host, ports=free_ports(3)))
    key = directory / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    monkeypatch.setenv("SLURM_CONF", str(config))
    monkeypatch.setenv("PYTHON", sys.executable)
    (job / "task.py").write_text(TASK)
    daemons = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in (
            ["munged", "--foreground", "--force", f"--key-file={key}",
             f"--socket={directory}/munge", f"--pid-file={directory}/munged.pid",
             f"--seed-file={directory}/seed", f"--log-file={directory}/munged.log"],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", "127.0.0.1"],
            ["slurmd", "-D", "-N", "127.0.0.2"],
        )
    ]  # fmt: skip

    def ask(*command):
        return subprocess.run(
            command, cwd=job, text=True, check=True, stdout=subprocess.PIPE
        ).stdout.strip()

    try:
        wait_until(lambda: "2 idle" in ask("sinfo", "--noheader", "--format=%D %t"))
        yield ask
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)
        shutil.rmtree(directory)


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except subprocess.CalledProcessError:  # slurmctld is not up yet
            pass
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_a_real_slurm_runs_two_nodes_and_goes_on_after_a_requeue(job, slurm):
    def submit(status):
        (job / "enough").unlink(missing_ok=True)
        return slurm(
            "sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", "launch/slurm.sbatch",
            sys.executable, "task.py", str(status),
        )  # fmt: skip

    def log(number):
        path = job / f"slurm-{number}.log"
        return path.read_text() if path.exists() else ""

    def state(number):
        shown = slurm("scontrol", "show", "job", number)
        return re.search(r"JobState=(\w+)", shown)[1], re.search(r"ExitCode=(\d+)", shown)[1]

    number = submit(0)
    wait_until(lambda: {"0: task 0 of 2", "1: task 1 of 2"} <= {*log(number).splitlines()})
    slurm("scontrol", "requeue", number)
    wait_until(lambda: state(number)[0] == "PENDING")
    assert "0: saved after 1" in log(number)
    assert "1: saved after 1" in log(number)
    assert "Ended by SLURM, with 75." in log(number)
    slurm("scontrol", "update", f"JobId={number}", "StartTime=now")  # not in two minutes
    wait_until(lambda: "Start 2: 2 node(s) with 1 process(es) each" in log(number))
    (job / "enough").touch()
    wait_until(lambda: state(number) == ("COMPLETED", "0"))

    number = submit(2)
    wait_until(lambda: "1: task 1 of 2" in log(number))
    (job / "enough").touch()
    wait_until(lambda: state(number) == ("FAILED", "2"))

    number = submit(1)
    wait_until(lambda: "1: task 1 of 2" in log(number))
    (job / "enough").touch()
    wait_until(lambda: "Again: 1 counts, restart 1 of 10" in log(number))
    wait_until(lambda: state(number)[0] == "PENDING")
    slurm("scancel", number)

    number = submit(0)
    wait_until(lambda: "1: task 1 of 2" in log(number))
    slurm("scancel", number)
    wait_until(lambda: state(number) == ("CANCELLED", "75"))
    assert log(number).count(": saved after 1") == 2
