"""One process of a run that does nothing but join the others and add with them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lumina_jax import cli, distributed


def main() -> None:
    distributed.from_flags()
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    own = np.full(jax.local_device_count(), jax.process_index() + 1.0)
    numbers = multihost_utils.host_local_array_to_global_array(own, mesh, P("data"))
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))(numbers)
    print(f"sum over {jax.process_count()} processes: {float(total):g}")


if __name__ == "__main__":
    distributed.define_flags()
    cli.run(main)
