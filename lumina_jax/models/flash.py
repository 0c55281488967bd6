"""Flash attention for TPUs, in Pallas: scores stay on the chip, forward and backward.

Written for the joint sequence of a diffusion transformer, where every token may attend to every
other one and a few thousand tokens are all there is. So the keys and values of a head, and their
gradients, stay in the chip's vector memory as a whole, and one grid step takes a block of queries
against all of them. Against the kernel that comes with JAX (splash): no second pass and no partial
sums for the gradient of the queries, no block of keys that must divide the length, both cores of a
TPU v4 or v5p at work in the backward pass, and no vector instruction spent on the mask.

The mask costs nothing because the matrix unit works in lanes of 128 and a head has fewer features
(96 here). The lanes left over hold, for each segment s, -BIG at queries that are not of s and 1 at
keys that are: their product is 0 within a segment and -BIG across.

    p = 2 ** (q k^T - lse)      q times log2(e) / sqrt(d) beforehand: 2 ** x is what a TPU computes
    ds = p * (do v^T - sum(do * o))
    dq = ds k / log2(e)    dk = ds^T q / log2(e)    dv = p^T do      (Dao, arXiv 2307.08691)

Axes: B batch, H query heads, K key and value heads, G = H / K, T tokens, d features of a head.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

LANES = 128
SEGMENTS = (0, 1)  # those that the left-over lanes tell apart
MAX_HEAD_DIM = LANES - len(SEGMENTS)
_BIG = 1e30
_VMEM_LIMIT = 100 * 2**20  # bytes; a core has 128 MiB (v5e, v6e)


def flash_attention(
    q: Float[Array, "B H T d"],
    k: Float[Array, "B K T d"],
    v: Float[Array, "B K T d"],
    segment_ids: Int[Array, "B T"],
    *,
    interpret: bool = False,
) -> Float[Array, "B H T d"]:
    """softmax(q k^T / sqrt(d)) v among the tokens of the same segment, on one device.

    Args:
      q: Queries; query heads j G to (j + 1) G - 1 use key head j.
      k: Keys.
      v: Values.
      segment_ids: Of SEGMENTS.
      interpret: Run it as plain JAX, anywhere.
    """
    num_tokens, head_dim = q.shape[2:]
    scale = math.log2(math.e) / math.sqrt(head_dim)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    # A length that is not in lanes is filled up with tokens of a segment that is nobody's.
    if fill := -num_tokens % LANES:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, fill), (0, 0))) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, fill)), constant_values=-1)
    return _flash(q, k, v, segment_ids[..., None], interpret)[:, :, :num_tokens]


def _with_mask(x, ids, *, query: bool):
    """[n, d] to [n, LANES], in the lanes left over what makes products 0 or -BIG."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], LANES), 1)
    wide = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, LANES - x.shape[1])))
    for n, segment in enumerate(SEGMENTS):
        # Keys of nobody are for no query; queries of nobody are cut off by the caller.
        ours = (
            jnp.where(ids == segment, 0.0, -_BIG)
            if query
            else jnp.where((ids == segment) | (ids < 0), 1.0, 0.0)
        )
        wide = jnp.where(lanes == x.shape[1] + n, ours, wide)
    return wide.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q, k, v, ids, interpret):
    return _forward(q, k, v, ids, interpret)[0]


def _flash_forward(q, k, v, ids, interpret):
    o, lse = _forward(q, k, v, ids, interpret)
    o, lse = checkpoint_name(o, "attention"), checkpoint_name(lse, "attention")
    return o, (q, k, v, ids, o, lse)


def _flash_backward(interpret, residuals, do):
    return *_backward(*residuals, do, interpret), None


_flash.defvjp(_flash_forward, _flash_backward)


def _blocks(num_tokens: int) -> tuple[int, list[slice]]:
    """How many queries a grid step takes, and the parts in which the keys meet them.

    Of 128 to 512 queries and 256 to 2176 keys these need the fewest cycles on v5e and v6e, by the
    instructions that the compiler issues (docs/performance.md).
    """
    units = num_tokens // LANES
    block = LANES * max(n for n in (1, 2) if units % n == 0)
    return block, [slice(i, min(i + 1024, num_tokens)) for i in range(0, num_tokens, 1024)]


def _dot(a, b, contract):
    """The matrix product that sums over one dim of each, in float32."""
    dims = (contract[:1], contract[1:])
    return jax.lax.dot_general(a, b, (dims, ((), ())), preferred_element_type=jnp.float32)


def _fold(op, x):
    """[n, m * LANES] to [n, LANES]; what is left for the slow way across lanes is done once."""
    return functools.reduce(op, [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)])


def _forward(q, k, v, ids, interpret):
    (num_tokens, head_dim), (block, chunks) = q.shape[2:], _blocks(q.shape[2])

    def kernel(q_ref, k_ref, v_ref, ids_ref, key_ids_ref, o_ref, lse_ref, wide_k):
        @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
        def _():
            wide_k[...] = _with_mask(k_ref[...], key_ids_ref[...], query=False)

        q = _with_mask(q_ref[...], ids_ref[...], query=True)
        highest = jnp.full((block, 1), -jnp.inf, jnp.float32)
        total = jnp.zeros((block, LANES), jnp.float32)
        o = jnp.zeros((block, head_dim), jnp.float32)
        following = _dot(q, wide_k[chunks[0], :], (1, 1))
        for n, keys in enumerate(chunks):
            scores = following
            if n + 1 < len(chunks):  # asked for now, so that the matrix unit has work below
                following = _dot(q, wide_k[chunks[n + 1], :], (1, 1))
            before = highest
            highest = jnp.maximum(
                before, jnp.max(_fold(jnp.maximum, scores), axis=1, keepdims=True)
            )
            p = jnp.exp2(scores - highest)
            shrink = jnp.exp2(before - highest)
            total = total * shrink + _fold(jnp.add, p)
            o = o * shrink + _dot(p.astype(v_ref.dtype), v_ref[keys, :], (1, 0))
        total = jnp.sum(total, axis=1, keepdims=True)
        o_ref[...] = (o / total).astype(o_ref.dtype)
        lse = jnp.broadcast_to(highest + jnp.log2(total), (block, LANES))
        lse_ref[...] = lse.T[:1]

    return _call(
        kernel,
        (q, k, v, ids, ids),
        kinds=("query", "key", "key", "query id", "key id"),
        outputs=("query", "row"),
        scratch_shapes=[pltpu.VMEM((num_tokens, LANES), k.dtype)],
        block=block,
        name="flash_forward",
        interpret=interpret,
    )


def _backward(q, k, v, ids, o, lse, do, interpret):
    (num_tokens, head_dim), (block, chunks) = q.shape[2:], _blocks(q.shape[2])
    last = (q.shape[1] // k.shape[1] - 1, q.shape[2] // block - 1)
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)[:, :, None]

    def kernel(
        q_ref, k_ref, v_ref, ids_ref, key_ids_ref, do_ref, lse_ref, delta_ref,
        dq_ref, dk_ref, dv_ref, wide_k, dk, dv,
    ):  # fmt: skip
        place = pl.program_id(2), pl.program_id(3)

        @pl.when((place[0] == 0) & (place[1] == 0))
        def _():
            dk[...] = jnp.zeros_like(dk)
            dv[...] = jnp.zeros_like(dv)
            wide_k[...] = _with_mask(k_ref[...], key_ids_ref[...], query=False)

        q, do = q_ref[...], do_ref[...]
        wide_q = _with_mask(q, ids_ref[...], query=True)
        lse, delta = lse_ref[...], delta_ref[...]
        dq = jnp.zeros((block, head_dim), jnp.float32)
        for keys in chunks:
            key, value = k_ref[keys, :], v_ref[keys, :]
            # Transposed, [keys, queries]: then only dq needs a transposed operand.
            p = jnp.exp2(_dot(wide_k[keys, :], wide_q, (1, 1)) - lse)
            dv[keys, :] += _dot(p.astype(do.dtype), do, (1, 0))
            ds = (p * (_dot(value, do, (1, 1)) - delta)).astype(q.dtype)
            dk[keys, :] += _dot(ds, q, (1, 0))
            dq += _dot(ds, key, (0, 0))
        dq_ref[...] = (dq * math.log(2)).astype(dq_ref.dtype)

        @pl.when((place[0] == last[0]) & (place[1] == last[1]))
        def _():
            dk_ref[...] = (dk[...] * math.log(2)).astype(dk_ref.dtype)
            dv_ref[...] = dv[...].astype(dv_ref.dtype)

    return _call(
        kernel,
        (q, k, v, ids, ids, do, lse, delta),
        kinds=("query", "key", "key", "query id", "key id", "query", "row", "row"),
        outputs=("query", "key", "key"),
        scratch_shapes=[
            pltpu.VMEM((num_tokens, LANES), k.dtype),
            *[pltpu.VMEM((num_tokens, head_dim), jnp.float32)] * 2,
        ],
        block=block,
        name="flash_backward",
        interpret=interpret,
    )


def _call(kernel, inputs, *, kinds, outputs, block, name, interpret, scratch_shapes=()):
    """Runs a kernel over (batch, key head, query head of it, block of queries).

    What it sees of an array depends on its kind: of a `query` array a block [block, d], of a `key`
    array all tokens [T, d], of a `row` array (a number for each query) [1, block], of the segment
    ids [block, 1] or [T, 1].
    """
    (batch, num_heads, num_tokens, head_dim), num_kv_heads = inputs[0].shape, inputs[1].shape[1]
    group = num_heads // num_kv_heads
    specs = {
        "query": pl.BlockSpec(
            (None, None, block, head_dim), lambda b, h, g, i: (b, h * group + g, i, 0)
        ),
        "key": pl.BlockSpec((None, None, num_tokens, head_dim), lambda b, h, g, i: (b, h, 0, 0)),
        "row": pl.BlockSpec((None, None, 1, block), lambda b, h, g, i: (b, h * group + g, 0, i)),
        "query id": pl.BlockSpec((None, block, 1), lambda b, h, g, i: (b, i, 0)),
        "key id": pl.BlockSpec((None, num_tokens, 1), lambda b, h, g, i: (b, 0, 0)),
    }
    dtype = inputs[0].dtype
    shapes = {
        "query": jax.ShapeDtypeStruct((batch, num_heads, num_tokens, head_dim), dtype),
        "key": jax.ShapeDtypeStruct((batch, num_kv_heads, num_tokens, head_dim), dtype),
        "row": jax.ShapeDtypeStruct((batch, num_heads, 1, num_tokens), jnp.float32),
    }
    return pl.pallas_call(
        kernel,
        grid=(batch, num_kv_heads, group, num_tokens // block),
        in_specs=[specs[kind] for kind in kinds],
        out_specs=[specs[kind] for kind in outputs],
        out_shape=[shapes[kind] for kind in outputs],
        scratch_shapes=scratch_shapes,
        compiler_params=pltpu.CompilerParams(
            # Gradients of keys are summed over the last two; the first two are free for two cores.
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_VMEM_LIMIT,
        ),
        name=name,
        interpret=interpret,
    )(*inputs)
