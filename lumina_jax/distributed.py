"""Joining the processes of one run.

Where this process stands among the others comes from flags or variables, or from what JAX knows of
clusters: Open MPI, SLURM, TPUs on GKE and on Cloud TPU VMs, Kubernetes jobs. Before JAX joins them
the roll is called.
"""

import atexit
import importlib.util
import os
import re
import socket
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils

from lumina_jax.errors import RESTART, InputError, JoinError, RestartError
from lumina_jax.peers import Peers
from lumina_jax.roll_call import Place, call_the_roll

_VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


def define_flags() -> None:
    """Flags of a command that several processes may run together."""
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0, to join several.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
    flags.DEFINE_float("join_timeout", 300.0, "Seconds to wait for all processes.", lower_bound=0)
    flags.DEFINE_float(
        "lost_timeout", 60.0, "Seconds after which a silent process is lost.", lower_bound=1
    )


def initialize(
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    join_timeout: float = 300.0,
    lost_timeout: float = 60.0,
) -> None:
    """Starts `jax.distributed` where this process is one of several; elsewhere it is alone.

    Args:
      coordinator_address: host:port of process 0. This and the next two take the place of
        JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; without any of the six a
        cluster is looked for.
      num_processes: How many there are.
      process_id: Which of them this one is.
      join_timeout: Seconds to wait for all of them; then all that wait end with a JoinError that
        names the missing.
      lost_timeout: Seconds after which a process that gives no sign of life counts as lost; then
        all others end with the status that asks for another start.
    """
    place = _from_settings(coordinator_address, num_processes, process_id)
    if place is None and (cluster := _cluster_sign()):
        place = _from_cluster(cluster, join_timeout)
    if place is not None:
        call_the_roll(place, join_timeout)
        jax.distributed.initialize(
            place.address, place.num_processes, place.process_id, place.local_device_ids,
            # It aborts this process when another is lost; ours comes first, and says more. A sign
            # of life may be half of this time old when it is the last, and ours leaves slowly.
            heartbeat_timeout_seconds=round(4 * lost_timeout),
        )  # fmt: skip
        _watch_over(place, lost_timeout)
    logging.info(
        "Process %d of %d; %d of %d devices (%s) are its own.",
        jax.process_index(), jax.process_count(),
        jax.local_device_count(), jax.device_count(), jax.devices()[0].device_kind,
    )  # fmt: skip


def from_flags() -> None:
    """`initialize` with the flags of `define_flags`."""
    names = (*_VARIABLES, "join_timeout", "lost_timeout")
    initialize(**{name: flags.FLAGS[name].value for name in names})


def _from_settings(*given) -> Place | None:
    values = {
        name: os.environ.get(variable) if value is None else value
        for (name, variable), value in zip(_VARIABLES.items(), given, strict=True)
    }
    present = [_setting(name) for name, value in values.items() if value is not None]
    missing = [_setting(name) for name, value in values.items() if value is None]
    if present and missing:
        raise InputError(
            f"{', '.join(present)} is set without {', '.join(missing)}. Set all three for a run "
            f"of several processes, or none."
        )
    if missing:
        return None
    try:
        numbers = int(values["num_processes"]), int(values["process_id"])
    except ValueError:
        raise InputError(
            f"JAX_NUM_PROCESSES={values['num_processes']!r} and "
            f"JAX_PROCESS_ID={values['process_id']!r} must be whole numbers."
        ) from None
    return Place(values["coordinator_address"], *numbers)


def _setting(name: str) -> str:
    return f"--{name} (or {_VARIABLES[name]})"


def _cluster_sign() -> str | None:
    """What makes this process look for others."""
    if os.environ.get("SLURM_NTASKS", "1") != "1":
        return "SLURM_NTASKS"
    for name in ("OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX"):
        if name in os.environ:
            return name
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    if "tpu" in platforms and importlib.util.find_spec("libtpu") is not None:
        return "libtpu"
    return None


def _from_cluster(sign: str, timeout: float) -> Place | None:
    """The place that JAX finds by itself; None on a machine with libtpu and no cluster."""
    # Not public: jax.distributed.initialize asks the same, but joins at once.
    from jax._src import clusters

    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(timeout)
        )
    except RuntimeError as error:  # an address without a host, no right to ask Kubernetes
        raise JoinError(f"This process may be one of several ({sign}), but {error}") from error
    address, num_processes, process_id, devices = found
    if address is None:
        if sign == "libtpu":
            return None
        raise InputError(
            f"{sign}={os.environ[sign]} says that this process is one of several, but JAX finds no "
            f"cluster of Open MPI, SLURM or Kubernetes. Start it with mpirun or srun (also inside "
            f"sbatch), on Kubernetes install jax[k8s], or give --coordinator_address, "
            f"--num_processes and --process_id."
        )
    hosts = _slurm_hosts() or _tpu_hosts(num_processes)
    devices = None if devices is None else tuple(devices)
    return Place(address, num_processes, process_id, devices, hosts)


def _slurm_hosts() -> tuple[str, ...]:
    """The host of each task of a SLURM step; () elsewhere, or where tasks lie in another order."""
    environ = os.environ
    nodes, tasks = environ.get("SLURM_STEP_NODELIST"), environ.get("SLURM_STEP_TASKS_PER_NODE")
    if not nodes or not tasks or not environ.get("SLURM_DISTRIBUTION", "block").startswith("block"):
        return ()
    counts = []
    for part in tasks.split(","):  # such as 8(x2),4
        number, _, times = part.partition("(x")
        counts += [int(number)] * int(times.rstrip(")") or 1)
    names = expand_nodes(nodes)
    if len(names) != len(counts):  # written in a way that is not understood here
        return ()
    return tuple(name for name, count in zip(names, counts, strict=True) for _ in range(count))


def expand_nodes(nodes: str) -> list[str]:
    """The names in a SLURM node list: "gpu[01-02,7],login" is gpu01, gpu02, gpu7 and login."""
    names = []
    for prefix, ranges, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", nodes):
        if not ranges:
            names.append(prefix)
            continue
        for part in ranges.split(","):
            low, _, high = part.partition("-")
            for number in range(int(low), int(high or low) + 1):
                names.append(f"{prefix}{number:0{len(low)}d}{suffix}")
    return names


def _tpu_hosts(num_processes: int) -> tuple[str, ...]:
    """The host of each process on TPUs of GKE; of other slices a process knows only the numbers."""
    names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if not names:
        return ()
    own = [name.strip() for name in names.split(",")]
    if num_processes % len(own):
        return ()
    hosts = []
    for number in range(num_processes // len(own)):
        mine = str(number) == os.environ.get("MEGASCALE_SLICE_ID", "0")
        workers = (f"slice {number}, worker {worker}" for worker in range(len(own)))
        hosts += own if mine else workers
    return tuple(hosts)


def faults(own: str) -> dict[int, str]:
    """What went wrong on which process; each says its own, "" if nothing did, and waits for all."""
    text = np.zeros(1000, np.uint8)
    said = own.encode()[: len(text)]
    text[: len(said)] = np.frombuffer(said, np.uint8)
    rows = multihost_utils.process_allgather(text).reshape(-1, len(text))
    found = (row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows)
    return {process: fault for process, fault in enumerate(found) if fault}


def meet(name: str) -> None:
    """Returns when every process of the run is here; at once where it is alone.

    The devices take no part, so nothing of theirs runs out of time. Who never comes is lost or
    hangs, which `peers` and the watchdog notice.
    """
    if _peers is not None:
        _peers.meet(name)


def peers() -> Peers | None:
    """The other processes of this run; None where it is alone."""
    return _peers


def fail(status: int, reason: str, error: Exception | None = None) -> None:
    """Ends all processes of the run for the reason of this one; returns where it is alone.

    An `error` of the devices may only follow from a process that is lost: then that is the reason.
    """
    if _peers is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            _peers.wait_for_verdict()
        process = f"Process {jax.process_index()} ({socket.gethostname()})"
        _peers.end_all(status, f"{process} has failed: {reason}")


_peers: Peers | None = None


def _watch_over(place: Place, lost_timeout: float) -> None:
    global _peers
    # Not public; multihost_utils only has what waits for all.
    from jax._src import distributed

    _peers = Peers(
        distributed.global_state.client,
        place.process_id,
        place.num_processes,
        name=place.name,
        lost_timeout=lost_timeout,
    )
    atexit.register(_peers.close)  # before JAX leaves its cluster


def told_by_first(find: Callable[[], Sequence[int]], num: int) -> list[int]:
    """What process 0 finds, `num` numbers, on every process; an InputError there stops all."""
    numbers, fault = np.zeros(num + 1, np.int64), None
    if jax.process_index() == 0:
        try:
            numbers[:num] = find()
        except InputError as error:
            numbers[num], fault = error.status, error
    *found, status = multihost_utils.broadcast_one_to_all(numbers).tolist()
    if status:
        kind = RestartError if status == RESTART else InputError
        raise fault or kind("Process 0 cannot go on; its last message says why.")
    return found
