"""Many equal blocks as one: made with vmap, run with scan, recomputed in the backward pass.

A scanned stack compiles one block whatever its depth, and its parameters have a leading dim of
layers, so that one sharding rule serves them all.
"""

from collections.abc import Callable

import jax
from flax import nnx

from lumina_jax import sharding

# Of a block, by the names that the layers give them with checkpoint_name: what attention gives
# (and its normaliser), both products inside the feed-forward, what the feed-forward gives. With
# these the backward pass repeats the projections of attention alone, 6 % of all operations.
NAMES = ("attention", "gate", "up", "ffn_out")
_policies = jax.checkpoint_policies

# What the backward pass finds saved, from the least memory on the device to the most.
REMAT_POLICIES = {
    "full": _policies.nothing_saveable,
    "attention": _policies.save_only_these_names("attention"),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["attention"],
        names_which_can_be_offloaded=["gate", "up", "ffn_out"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "names": _policies.save_only_these_names(*NAMES),
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names("attention")
    ),
    "none": _policies.everything_saveable,
}


def stack_blocks(make_block: Callable[[nnx.Rngs], nnx.Module], num: int, *, rngs: nnx.Rngs):
    """Makes `num` blocks in one, each parameter with a leading dim of layers."""
    keys = jax.random.split(rngs.params(), num)
    return jax.vmap(lambda key: make_block(nnx.Rngs(key)))(keys)


def scan_blocks(blocks, xs: tuple, args: tuple[tuple, ...], *, remat: str, dtype: str) -> tuple:
    """Applies stacked blocks in order: x = block(x, *its args) for each of several sequences.

    The sequences go through a layer together, so that its kernels, which are cast to `dtype`, are
    gathered once for all and their gradients are summed before they are scattered back. Of the
    sequences after the first, the short ones, nothing is kept for the backward pass unless
    everything is: a tenth of the operations is repeated more cheaply than its memory is had.
    """

    def pin(x):
        return sharding.constrain(x, ("act_batch", "act_sequence", "act_embed"))

    def body(xs, block):
        block = sharding.gather(block, dtype)

        def apply(x, its):
            return block(x, *its)

        again = apply if remat == "none" else jax.checkpoint(apply, prevent_cse=False)
        calls = [apply] + [again] * (len(xs) - 1)
        return tuple(pin(call(x, its)) for call, x, its in zip(calls, xs, args, strict=True)), None

    body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    xs, _ = jax.lax.scan(body, tuple(pin(x) for x in xs), blocks)
    return xs
