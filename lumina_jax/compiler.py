"""What the compiler is told, by kind of device."""

import jax

# The tiles of a matrix product lie in a TPU's vector memory; with more of it than the 16 MiB that
# are the default they are larger, and operands are read less often (docs/performance.md).
_TPU_OPTIONS = {"xla_tpu_scoped_vmem_limit_kib": "32768"}


def options(mesh: jax.sharding.Mesh) -> dict[str, str]:
    """For `jax.jit(compiler_options=)` of the large programs."""
    return dict(_TPU_OPTIONS) if mesh.devices.flat[0].platform == "tpu" else {}
