"""Eight emulated devices for every test, and no silent broadcasting."""

import os

# Before jax is imported: with libtpu installed a bare import would look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
