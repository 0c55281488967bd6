"""Joining the processes of one run."""

import os

import jax
from absl import logging

# Set by the launcher of a run with several processes, one line each: JAX's own variable, Cloud TPU,
# SLURM, Open MPI.
_CLUSTER_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def initialize() -> None:
    """Starts `jax.distributed` where the environment says that this process is one of several.

    JAX_COORDINATOR_ADDRESS needs JAX_NUM_PROCESSES and JAX_PROCESS_ID beside it; the others are
    understood by JAX itself. Without any of them the process is alone.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            os.environ["JAX_COORDINATOR_ADDRESS"],
            int(os.environ["JAX_NUM_PROCESSES"]),
            int(os.environ["JAX_PROCESS_ID"]),
        )
    elif any(_is_several(os.environ.get(name, "")) for name in _CLUSTER_VARIABLES):
        jax.distributed.initialize()
    logging.info(
        "Process %d of %d; %d of %d devices (%s) are its own.",
        jax.process_index(), jax.process_count(),
        jax.local_device_count(), jax.device_count(), jax.devices()[0].device_kind,
    )  # fmt: skip


def _is_several(value: str) -> bool:
    """Whether a variable names several hosts ("a,b") or a count above one."""
    return "," in value or (value.isdecimal() and int(value) > 1)
