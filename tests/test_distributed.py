"""Where a process finds its place, and real processes that meet or do not."""

import os
import pathlib
import subprocess
import sys

import pytest

from lumina_jax import distributed
from lumina_jax.errors import InputError
from lumina_jax.roll_call import Place
from tests.small_data import free_address

ROOT = pathlib.Path(__file__).parents[1]
SIGNS = (
    "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "OMPI_COMM_WORLD_SIZE",
    "JOB_COMPLETION_INDEX", "SLURM_NTASKS", "KUBERNETES_SERVICE_HOST", "TPU_WORKER_HOSTNAMES",
)  # fmt: skip


@pytest.fixture
def joined(monkeypatch):
    """The places that would be joined; nothing is, because this process has used JAX already."""
    places = []
    monkeypatch.setattr(distributed, "call_the_roll", lambda place, _: places.append(place))
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(distributed, "_watch_over", lambda place, _: None)
    for name in SIGNS:
        monkeypatch.delenv(name, raising=False)
    return places


def test_alone_without_any_sign_of_others(joined):
    distributed.initialize()
    assert joined == []


def set_all(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_joined_by_the_three_variables(joined, monkeypatch):
    set_all(monkeypatch, JAX_COORDINATOR_ADDRESS="host:1234")
    set_all(monkeypatch, JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="3")
    distributed.initialize()
    assert joined == [Place("host:1234", 4, 3)]


def test_arguments_replace_variables(joined, monkeypatch):
    set_all(monkeypatch, JAX_COORDINATOR_ADDRESS="host:1234", JAX_NUM_PROCESSES="4")
    distributed.initialize(coordinator_address="other:80", process_id=0)
    assert joined == [Place("other:80", 4, 0)]


def test_one_of_the_three_is_not_enough(joined, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    with pytest.raises(InputError, match=r"without --num_processes .or JAX_NUM_PROCESSES., --pro"):
        distributed.initialize()


def test_numbers_are_numbers(joined, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "four")
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES='four' and JAX_PROCESS_ID=1 must be"):
        distributed.initialize(coordinator_address="host:80", process_id=1)


def slurm(monkeypatch, **changes):
    values = {
        "SLURM_JOB_ID": "4096", "SLURM_NTASKS": "5", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[01-02],login", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    }  # fmt: skip
    set_all(monkeypatch, **values | changes)


def test_a_task_of_slurm_knows_the_hosts_of_all(joined, monkeypatch):
    slurm(monkeypatch)
    distributed.initialize()
    hosts = ("gpu01", "gpu01", "gpu02", "gpu02", "login")
    assert joined == [Place("gpu01:61440", 5, 3, (1,), hosts)]


def test_tasks_in_another_order_are_known_by_number_only(joined, monkeypatch):
    slurm(monkeypatch, SLURM_DISTRIBUTION="cyclic")
    distributed.initialize()
    assert joined[0].hosts == ()


def test_a_lone_task_of_slurm_is_alone(joined, monkeypatch):
    slurm(monkeypatch, SLURM_NTASKS="1")
    distributed.initialize()
    assert joined == []


def test_slurm_without_srun_is_told_so(joined, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(InputError, match=r"SLURM_NTASKS=4 says that.*Start it with mpirun or sru"):
        distributed.initialize()


def test_a_process_of_open_mpi_is_joined(joined, monkeypatch):
    set_all(
        monkeypatch,
        OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_LOCAL_RANK="1",
        OMPI_MCA_orte_hnp_uri="4096.0;tcp://10.0.0.1,10.1.0.1:34911",
    )  # fmt: skip
    distributed.initialize()
    assert joined == [Place("10.0.0.1:61441", 2, 1, (1,))]


@pytest.fixture
def tpu(monkeypatch):
    """A TPU VM of GKE, as JAX sees one: libtpu, chips, and the variables of the job."""
    from jax._src.clusters import cloud_tpu_cluster, cluster

    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name == "libtpu")
    set_all(
        monkeypatch,
        TPU_WORKER_ID="1", TPU_WORKER_HOSTNAMES="localhost,pod-1",
        MEGASCALE_COORDINATOR_ADDRESS="localhost", MEGASCALE_NUM_SLICES="1", MEGASCALE_SLICE_ID="0",
    )  # fmt: skip


def test_a_slice_on_gke_knows_its_hosts(joined, tpu):
    distributed.initialize()
    assert joined == [Place("localhost:8482", 2, 1, None, ("localhost", "pod-1"))]


def test_of_several_slices_a_process_knows_its_own_hosts(joined, tpu, monkeypatch):
    set_all(monkeypatch, MEGASCALE_NUM_SLICES="2", MEGASCALE_SLICE_ID="1")
    distributed.initialize()
    hosts = ("slice 0, worker 0", "slice 0, worker 1", "localhost", "pod-1")
    assert joined == [Place("localhost:8482", 4, 3, None, hosts)]


def test_a_kubernetes_job_needs_the_package_that_asks_for_it(joined, monkeypatch):
    set_all(monkeypatch, JOB_COMPLETION_INDEX="1")
    with pytest.raises(InputError, match=r"JOB_COMPLETION_INDEX=1 .* install jax.k8s."):
        distributed.initialize()


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("node7", ["node7"]),
        ("a,b", ["a", "b"]),
        ("gpu[08-10]", ["gpu08", "gpu09", "gpu10"]),
        ("gpu[1,7-8]-ib,login", ["gpu1-ib", "gpu7-ib", "gpu8-ib", "login"]),
    ],
)
def test_node_lists_of_slurm_are_spelt_out(nodes, names):
    assert distributed.expand_nodes(nodes) == names


def start(address, count, index, timeout, late=0):
    command = [
        sys.executable, "tests/joining.py", f"--coordinator_address={address}",
        f"--num_processes={count}", f"--process_id={index}", f"--join_timeout={timeout}",
        f"--late={late}",
    ]  # fmt: skip
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def results(processes):
    outputs = [process.communicate(timeout=120)[0].decode() for process in processes]
    return [process.returncode for process in processes], outputs


def test_three_processes_meet_and_add():
    address = free_address()
    status, outputs = results([start(address, 3, index, 60) for index in (2, 1, 0)])
    assert status == [0] * 3, outputs
    assert all("sum over 3 processes: 6" in output for output in outputs)


@pytest.mark.slow
def test_who_has_a_program_waits_for_who_compiles_it():
    """Gloo would end them after 30 seconds."""
    address = free_address()
    status, outputs = results([start(address, 2, index, 60, late=45) for index in (0, 1)])
    assert status == [0, 0], outputs


def test_two_of_three_processes_name_the_third_and_end():
    address = free_address()
    status, outputs = results([start(address, 3, index, 5) for index in (0, 1)])
    assert status == [75, 75], outputs
    for output in outputs:
        assert "1 of 3 processes did not join within 5 s: 2; joined: 0 (" in output
