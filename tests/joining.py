"""One process of a run that does nothing but join the others and add with them."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lumina_jax import cli, distributed
from lumina_jax.executables import Program

_LATE = flags.DEFINE_float("late", 0.0, "Seconds that process 0 needs for its program.")


def main() -> None:
    distributed.from_flags()
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    own = np.full(jax.local_device_count(), jax.process_index() + 1.0)
    numbers = multihost_utils.host_local_array_to_global_array(own, mesh, P("data"))

    def add(numbers):
        if jax.process_index() == 0:
            time.sleep(_LATE.value)
        return jnp.sum(numbers)

    everywhere = NamedSharding(mesh, P())
    total = Program(add, name="add", settings=dict, out_shardings=everywhere)(numbers)
    print(f"sum over {jax.process_count()} processes: {float(total):g}")


if __name__ == "__main__":
    distributed.define_flags()
    cli.run(main)
