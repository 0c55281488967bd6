"""Many equal blocks as one: made with vmap, run with scan, recomputed in the backward pass.

A scanned stack compiles one block whatever its depth, and its parameters have a leading dim of
layers, so that one sharding rule serves them all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
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


# Those that go by names.
NAMED = ("offload", "names")


def stack_blocks(make_block: Callable[[nnx.Rngs], nnx.Module], num: int, *, rngs: nnx.Rngs):
    """Makes `num` blocks in one, each parameter with a leading dim of layers."""
    keys = jax.random.split(rngs.params(), num)
    return jax.vmap(lambda key: make_block(nnx.Rngs(key)))(keys)


def scan_blocks(
    blocks,
    xs: tuple,
    args: tuple[tuple, ...],
    modulations: tuple | None = None,
    *,
    remat: str,
    dtype: str,
    span: tuple[int, int] | None = None,
) -> tuple:
    """Applies stacked blocks in order: x = block(x, *its args, modulation) for several sequences.

    The sequences go through a layer together, so that its kernels, which are cast to `dtype`, are
    gathered once for all and their gradients are summed before they are scattered back.

    Args:
      blocks: From `stack_blocks`.
      xs: The sequences.
      args: Of each sequence, the same for every block.
      modulations: Of each sequence, one for each block (`blocks.modulate`); None: not modulated.
      remat: A name in REMAT_POLICIES.
      dtype: Of the kernels.
      span: The first block, and the one after the last; all of them by default. For sampling: the
        gradient would be written once for each block.
    """

    def body(xs, layer):
        if span is not None:  # picked one by one: a slice of the stack would be copied
            layer = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), layers
            )
        block, modulations = layer
        block = sharding.gather(block, dtype)
        modulations = modulations or (None,) * len(xs)
        return tuple(
            sharding.split_tokens(block(x, *its, modulation))
            for x, its, modulation in zip(xs, args, modulations, strict=True)
        ), None

    if span is not None and span[0] == span[1]:
        return xs
    policy = REMAT_POLICIES[remat]
    if remat in NAMED:
        policy = _of_the_first(policy, num_tokens=xs[0].shape[0] * xs[0].shape[1])
    body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    layers = (_without_modulation(blocks), modulations)
    turns = layers if span is None else jnp.arange(*span)
    xs, _ = jax.lax.scan(body, tuple(sharding.split_tokens(x) for x in xs), turns)
    return xs


def _without_modulation(blocks):
    """Its maps have done their work, and would be scanned and gathered for nothing."""

    def one(path, leaf):
        return None if "modulation" in jax.tree_util.keystr(path) else leaf

    return jax.tree_util.tree_map_with_path(one, blocks)


def _of_the_first(policy: Callable, *, num_tokens: int) -> Callable:
    """Keeps of the first sequence alone; of the others, which are short, what attention gives.

    The small picture of the auxiliary loss is a tenth of the operations and of the memory: on a
    full chip repeating it is cheaper than what the compiler would repeat to make room.
    """

    def chosen(primitive, *inputs, **params):
        if params.get("name") in ("gate", "up", "ffn_out"):
            (x,) = inputs
            if x.size // x.shape[-1] != num_tokens:
                return False
        return policy(primitive, *inputs, **params)

    return chosen
