"""Joining the processes of one run."""

import importlib.util
import os

import jax
from absl import logging

from lumina_jax.errors import InputError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> None:
    """Starts `jax.distributed` where this process may be one of several.

    That is with the three variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID,
    under SLURM with several tasks, under Open MPI, and on a machine with TPUs, where JAX asks the
    machine itself. Elsewhere the process is alone.
    """
    given = [name for name in _VARIABLES if name in os.environ]
    if given:
        if missing := [name for name in _VARIABLES if name not in os.environ]:
            raise InputError(
                f"{', '.join(given)} is set without {', '.join(missing)}. Set all three for a run "
                f"of several processes, or none."
            )
        address, count, index = (os.environ[name] for name in _VARIABLES)
        jax.distributed.initialize(address, int(count), int(index))
    elif os.environ.get("SLURM_NTASKS", "1") != "1" or "OMPI_COMM_WORLD_SIZE" in os.environ:
        jax.distributed.initialize()
    elif _may_have_tpus():
        try:
            jax.distributed.initialize()
        except ValueError as error:  # JAX found no cluster to ask
            logging.info("This process is alone: %s", error)
    logging.info(
        "Process %d of %d; %d of %d devices (%s) are its own.",
        jax.process_index(), jax.process_count(),
        jax.local_device_count(), jax.device_count(), jax.devices()[0].device_kind,
    )  # fmt: skip


def _may_have_tpus() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    return "tpu" in platforms and importlib.util.find_spec("libtpu") is not None
