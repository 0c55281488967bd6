"""Many equal blocks as one: made with vmap, run with scan, recomputed in the backward pass.

A scanned stack compiles one block whatever its depth, and its parameters have a leading dim of
layers, so that one sharding rule serves them all.
"""

from collections.abc import Callable

import jax
from flax import nnx

from lumina_jax import sharding

# What the backward pass finds saved, from the least memory to the least recomputation.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": jax.checkpoint_policies.everything_saveable,
}


def stack_blocks(make_block: Callable[[nnx.Rngs], nnx.Module], num: int, *, rngs: nnx.Rngs):
    """Makes `num` blocks in one, each parameter with a leading dim of layers."""
    keys = jax.random.split(rngs.params(), num)
    return jax.vmap(lambda key: make_block(nnx.Rngs(key)))(keys)


def scan_blocks(blocks, x, *args, remat: str, dtype: str):
    """Applies stacked blocks in order: x = block(x, *args) for each, kernels in `dtype`."""

    def pin(x):
        return sharding.constrain(x, ("act_batch", "act_sequence", "act_embed"))

    def body(x, block):
        return pin(sharding.gather(block, dtype)(x, *args)), None

    body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    x, _ = jax.lax.scan(body, pin(x), blocks)
    return x
