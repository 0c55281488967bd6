"""Attention: the one door to every kernel, and the layer that calls it.

    xla      jax.nn.dot_product_attention; anywhere, but it writes the scores [T, T] to memory
    flash    our Pallas kernel for TPUs (flash.py): scores stay on the chip, forward and backward
    splash   the Pallas kernel that comes with JAX, likewise
    cudnn    flash attention of cuDNN, for GPUs, in bfloat16

Axes: B batch, T tokens, D model width, H query heads, K key and value heads, d features of a head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jaxtyping import Array, Float, Int, Shaped

from lumina_jax import sharding
from lumina_jax.errors import InputError
from lumina_jax.models import flash, rope
from lumina_jax.models.layers import Projection, RMSNorm

IMPLEMENTATIONS = ("auto", "xla", "flash", "splash", "cudnn")
_GPU = ("gpu", "cuda")
_CPU_SCORES = 2**17  # numbers of a block for each key head: half a megabyte
_LANES = 128  # of a TPU: splash wants blocks of tokens in multiples of it


def attention(
    q: Float[Array, "B H T d"],
    k: Float[Array, "B K T d"],
    v: Float[Array, "B K T d"],
    segment_ids: Int[Array, "B T"],
    implementation: str,
) -> Float[Array, "B H T d"]:
    """softmax(q k^T / sqrt(d)) v among the tokens of the same segment, for any but flash.

    Padding is a segment of its own (0), so that no softmax is empty. Key head j serves the query
    heads j * H / K to (j + 1) * H / K - 1.

    Args:
      q: Queries.
      k: Keys.
      v: Values.
      segment_ids: 1 at tokens, 0 at padding; for cudnn, which knows lengths alone, padding comes
        last (`tokens_first`).
      implementation: What `choose` says.
    """
    return _FUNCTIONS[implementation](q, k, v, segment_ids)


def choose(implementation: str, dtype, head_dim: int) -> str:
    """The implementation that runs; one that cannot run here is an InputError that says why."""
    platform = sharding.platform()
    if implementation == "auto":
        chosen = "xla"
        if platform == "tpu":
            chosen = "flash" if head_dim <= flash.MAX_HEAD_DIM else "splash"
        elif platform in _GPU and dtype == jnp.bfloat16:
            chosen = "cudnn"
        logging.log_first_n(logging.INFO, "Attention on %s: %s.", 1, platform, chosen)
        return chosen
    on_tpu = platform != "tpu" and "it is a TPU kernel"
    faults = {
        "flash": on_tpu
        or (
            head_dim > flash.MAX_HEAD_DIM
            and f"heads have {head_dim} features, and it takes at most {flash.MAX_HEAD_DIM}"
        ),
        "splash": on_tpu,
        "cudnn": (platform not in _GPU and "it is a GPU kernel")
        or (dtype != jnp.bfloat16 and f"it computes in bfloat16, not {dtype}"),
    }
    if fault := faults.get(implementation):
        raise InputError(
            f"model.attention={implementation!r} cannot run on {platform}: {fault}. Use auto."
        )
    return implementation


def _xla(q, k, v, segment_ids):
    if sharding.platform() == "cpu":
        return _in_blocks(q, k, v, segment_ids)
    mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    # jax.nn wants heads behind tokens; XLA folds these transposes into its matrix products.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(jax.nn.dot_product_attention(q, k, v, mask=mask), 1, 2)


def _in_blocks(q, k, v, segment_ids):
    """For processors: the scores of so few queries at a time that they stay in the cache.

    Query heads of a key head are rows of one product. At 1088 tokens that is twice as fast as all
    scores at once, and more on a busy machine (docs/performance.md).
    """
    (batch, _, num_tokens, dim), kv_heads = q.shape, k.shape[1]
    groups = q.shape[1] // kv_heads
    size = max(_CPU_SCORES // (groups * num_tokens), 8)
    num_blocks = -(-num_tokens // size)
    size = -(-num_tokens // num_blocks)
    fill = num_blocks * size - num_tokens
    q = jnp.pad(q, ((0, 0), (0, 0), (0, fill), (0, 0)))
    # What fills the last block up is like the last token: an empty softmax has no gradient.
    ids = jnp.pad(segment_ids, ((0, 0), (0, fill)), mode="edge")
    q = q.reshape(batch, kv_heads, groups, num_blocks, size, dim)
    q = jnp.moveaxis(q, 3, 0).reshape(num_blocks, batch, kv_heads, groups * size, dim)
    ids = jnp.moveaxis(ids.reshape(batch, num_blocks, size), 1, 0)

    def attend(block):
        q, ids = block
        scores = jnp.einsum("bkqd,bktd->bkqt", q, k, preferred_element_type=jnp.float32)
        same = ids[:, :, None] == segment_ids[:, None, :]
        same = jnp.tile(same, (1, groups, 1))[:, None]
        scores = jnp.where(same, scores * dim**-0.5, -jnp.inf)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        heads = jnp.einsum(
            "bkqt,bktd->bkqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return (heads / total).astype(q.dtype)

    heads = jax.lax.map(attend, (q, ids)) if num_blocks > 1 else attend((q[0], ids[0]))[None]
    heads = heads.reshape(num_blocks, batch, kv_heads, groups, size, dim)
    heads = jnp.moveaxis(heads, 0, 3).reshape(batch, kv_heads * groups, num_blocks * size, dim)
    return heads[:, :, :num_tokens]


def _cudnn(q, k, v, segment_ids):
    """For tokens that lie before padding: lengths are all the mask it takes without a [T, T] array.

    Its gradient wants even lengths.
    """
    num_tokens = q.shape[2]
    lengths = jnp.sum(segment_ids, axis=1, dtype=jnp.int32)
    fill = ((0, 0), (0, num_tokens % 2), (0, 0), (0, 0))
    q, k, v = (jnp.pad(jnp.swapaxes(x, 1, 2), fill) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return jnp.swapaxes(out[:, :num_tokens], 1, 2)


class Order(NamedTuple):
    """Tokens in another order: `x[order]`, and `x[order][back]` is x again."""

    order: Int[Array, "B T"]
    back: Int[Array, "B T"]

    @property
    def reverse(self) -> "Order":
        return Order(self.back, self.order)


def tokens_first(segment_ids: Int[Array, "B T"]) -> Order:
    """Puts padding behind the tokens."""
    order = jnp.argsort(1 - segment_ids, axis=1, stable=True)
    return Order(order, jnp.argsort(order, axis=1))


@jax.custom_vjp
def reorder(order: Order, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
    """The same tokens in that order; its gradient is read too, not scattered."""
    index = order.order.reshape(order.order.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")


reorder.defvjp(
    lambda order, x: (reorder(order, x), order),
    lambda order, gradient: (None, reorder(order.reverse, gradient)),
)


def _sharded(call, arrays, kinds):
    """Each device attends for its own part of the batch and of the heads.

    Args:
      call: call(*arrays) -> heads, on one device.
      arrays: Its arguments.
      kinds: Of each: "heads" [B, h, T, d], "tokens" [B, T, ..] or "shared" by all.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return call(*arrays)
    specs = {
        "heads": sharding.spec(("act_batch", "act_heads")),
        "tokens": sharding.spec(("act_batch",)),
        "shared": sharding.spec(()),
    }
    return jax.shard_map(
        call, in_specs=tuple(specs[kind] for kind in kinds), out_specs=specs["heads"],
        check_vma=False,
    )(*arrays)  # fmt: skip


def _splash(q, k, v, segment_ids, interpret: bool = False):
    call = functools.partial(_splash_on_device, interpret=interpret)
    return _sharded(call, (q, k, v, segment_ids), ("heads",) * 3 + ("tokens",))


def _splash_on_device(q, k, v, segment_ids, *, interpret):
    num_heads, num_tokens, head_dim = q.shape[1:]
    # A length that is not in lanes is filled up with tokens of a segment that is nobody's.
    fill = -num_tokens % _LANES
    if fill:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, fill), (0, 0))) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, fill)), constant_values=-1)
    kernel = _splash_kernel(num_heads, num_tokens + fill, interpret)
    q = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype)

    def one(q, k, v, ids):
        return kernel(q, k, v, splash_attention_kernel.SegmentIds(q=ids, kv=ids))

    return jax.vmap(one)(q, k, v, segment_ids)[:, :, :num_tokens]


def _splash_kernel(num_heads: int, num_tokens: int, interpret: bool):
    mask = splash_attention_mask.FullMask((num_tokens, num_tokens))
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * num_heads),
        block_sizes=splash_blocks(num_tokens),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )


def splash_blocks(num_tokens: int) -> splash_attention_kernel.BlockSizes:
    """Tile sizes for this many tokens, a multiple of 128; each divides what it cuts."""
    block = _block(num_tokens, 1024)
    return splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=_block(block, 512),
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=_block(block, 512),
        use_fused_bwd_kernel=True,
    )


def _block(size: int, limit: int) -> int:
    """The largest multiple of 128 that divides `size` and is not above `limit`."""
    units = size // _LANES
    return _LANES * max(n for n in range(1, limit // _LANES + 1) if units % n == 0)


_FUNCTIONS = {"xla": _xla, "splash": _splash, "cudnn": _cudnn}


def flash_attention(
    q: Float[Array, "B H T d"],
    k: Float[Array, "B K T d"],
    v: Float[Array, "B K T d"],
    segment_ids: Int[Array, "B T"],
    q_norm: RMSNorm,
    k_norm: RMSNorm,
    freqs: rope.Freqs,
    *,
    interpret: bool = False,
) -> Float[Array, "B H T d"]:
    """`attention` with norms and rotation inside, on every device of the mesh."""
    call = functools.partial(flash.flash_attention, eps=q_norm.eps, interpret=interpret)
    scales = q_norm.scale[...], k_norm.scale[...]
    kinds = ("heads",) * 3 + ("shared",) * 2 + ("tokens",) * 3
    return _sharded(call, (q, k, v, *scales, *freqs, segment_ids), kinds)


class JointAttention(nnx.Module):
    """Grouped-query attention with normalised queries and keys, rotated by position."""

    def __init__(self, cfg, *, rngs: nnx.Rngs):
        heads = (cfg.num_heads, cfg.head_dim)
        kv_heads = (cfg.num_kv_heads, cfg.head_dim)
        self.implementation = cfg.attention
        # The reference initialises q, k and v as one matrix, hence one fan-out for the three.
        fused = (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
        kind = {"dtype": cfg.dtype, "quantization": cfg.quantization, "rngs": rngs}
        into = {"fans": (cfg.dim, fused), **kind}
        self.q = Projection("btD,Dhd->bhtd", (cfg.dim, *heads), **into)
        self.k = Projection("btD,Dhd->bhtd", (cfg.dim, *kv_heads), **into)
        self.v = Projection("btD,Dhd->bhtd", (cfg.dim, *kv_heads), **into)
        self.q_norm = RMSNorm(cfg.head_dim, eps=cfg.norm_eps)
        self.k_norm = RMSNorm(cfg.head_dim, eps=cfg.norm_eps)
        self.out = Projection("bhtd,hdD->btD", (*heads, cfg.dim), fans=(cfg.dim, cfg.dim), **kind)

    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], freqs: rope.Freqs
    ) -> Float[Array, "B T D"]:
        x = sharding.gather_tokens(x)
        q, k, v = (
            sharding.constrain(project(x), ("act_batch", "act_heads", None, None))
            for project in (self.q, self.k, self.v)
        )
        implementation = choose(self.implementation, q.dtype, q.shape[-1])
        if implementation == "flash":
            heads = flash_attention(q, k, v, segment_ids, self.q_norm, self.k_norm, freqs)
        else:
            q, k = rope.rotate(self.q_norm(q), freqs), rope.rotate(self.k_norm(k), freqs)
            heads = attention(q, k, v, segment_ids, implementation)
        return checkpoint_name(sharding.split_tokens(self.out(heads)), "attention_out")
