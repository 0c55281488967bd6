"""Flash attention for TPUs, in Pallas, of queries and keys that are normalised and rotated inside.

    q' = rotate(rms_norm(q) * scale_q) * log2(e) / sqrt(d)       k' = rotate(rms_norm(k) * scale_k)
    p  = 2 ** (q' k'^T - lse)            out = p v        2 ** x is what a TPU computes
    ds = p * (do v^T - sum(do * out))    dv = p^T do      (Dao, arXiv 2307.08691)
    dk' = ds^T q' * ln(2)                dq' = ds k' * ln(2), and on through rotation and norm

Scores stay on the chip, forward and backward, and so does all between the projections and the
scores: what enters and leaves is what the projections give and take.

It is written for the joint sequence of a diffusion transformer, where a few thousand tokens all
attend to each other. So the keys and values of a head, and their gradients, stay in the chip's
vector memory as a whole, and one grid step takes a block of queries against all of them. Against
the kernel that comes with JAX (splash): no second pass and no partial sums for the gradient of the
queries, no block of keys that must divide the length, and no vector instruction spent on the mask.

The mask costs nothing because the matrix unit works in lanes of 128 and a head has fewer features
(96 here). The lanes left over hold, for each segment s, -BIG at queries that are not of s and 1 at
keys that are: their product is 0 within a segment and -BIG across.

Axes: B batch, H query heads, K key and value heads, G = H / K, T tokens, d features of a head.
"""

import functools
import math
from typing import NamedTuple

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


class _Static(NamedTuple):
    """What a kernel is made for, besides shapes."""

    eps: float
    interpret: bool


def flash_attention(
    q: Float[Array, "B H T d"],
    k: Float[Array, "B K T d"],
    v: Float[Array, "B K T d"],
    scale_q: Float[Array, " d"],
    scale_k: Float[Array, " d"],
    cos: Float[Array, "B T d"],
    sin: Float[Array, "B T d"],
    segment_ids: Int[Array, "B T"],
    *,
    eps: float,
    interpret: bool = False,
) -> Float[Array, "B H T d"]:
    """Attention of normalised and rotated queries and keys within segments, on one device.

    Args:
      q: What the projection gives; query heads j G to (j + 1) G - 1 use key head j.
      k: Likewise.
      v: Values.
      scale_q: Of the RMS norm of queries.
      scale_k: Of that of keys.
      cos: Of the rotation, see `rope.Freqs`.
      sin: Likewise.
      segment_ids: Of SEGMENTS.
      eps: Of the norms.
      interpret: Run it as plain JAX, anywhere.
    """
    num_tokens = q.shape[2]
    # A length that is not in lanes is filled up with tokens of a segment that is nobody's.
    if fill := -num_tokens % LANES:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, fill), (0, 0))) for x in (q, k, v))
        cos, sin = (jnp.pad(x, ((0, 0), (0, fill), (0, 0))) for x in (cos, sin))
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, fill)), constant_values=-1)
    scales = scale_q[None], scale_k[None]
    out = _flash(q, k, v, *scales, cos, sin, segment_ids[..., None], _Static(eps, interpret))
    return out[:, :, :num_tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _flash(q, k, v, scale_q, scale_k, cos, sin, ids, static):
    return _forward(q, k, v, scale_q, scale_k, cos, sin, ids, static)[0]


def _flash_forward(*args):
    out, lse = _forward(*args)
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return out, (*args[:-1], out, lse)


def _flash_backward(static, residuals, do):
    *inputs, out, lse = residuals
    # Of each query; in XLA, which makes it while it reads `do` for the projection's gradient.
    delta = jnp.sum(out.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)[:, :, None]
    *gradients, scale_q, scale_k = _backward(*inputs, do, lse, delta, static)
    scales = (
        jnp.sum(parts, axis=(0, 1)).astype(scale.dtype)
        for parts, scale in ((scale_q, inputs[3]), (scale_k, inputs[4]))
    )
    return *gradients, *scales, None, None, None


_flash.defvjp(_flash_forward, _flash_backward)


def _blocks(num_tokens: int) -> tuple[int, list[slice]]:
    """How many queries a grid step takes, and the parts in which the keys meet them.

    Of 128 to 512 queries and 256 to 2176 keys these need the fewest cycles on v5e and v6e, by the
    instructions that the compiler issues (docs/performance.md).
    """
    block = 2 * LANES if num_tokens % (2 * LANES) == 0 else LANES
    return block, [slice(i, min(i + 1024, num_tokens)) for i in range(0, num_tokens, 1024)]


def _forward(q, k, v, scale_q, scale_k, cos, sin, ids, static):
    (num_tokens, head_dim), (block, chunks) = q.shape[2:], _blocks(q.shape[2])

    def kernel(
        q_ref, k_ref, v_ref, scale_q_ref, scale_k_ref, cos_q_ref, sin_q_ref, cos_k_ref, sin_k_ref,
        ids_q_ref, ids_k_ref, out_ref, lse_ref, keys,
    ):  # fmt: skip
        @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
        def _():
            for rows in chunks:
                turned = _rotated(
                    k_ref[rows, :], scale_k_ref[...], cos_k_ref[rows, :], sin_k_ref[rows, :], static
                )
                keys[rows, :] = _with_mask(turned, ids_k_ref[rows, :], k_ref.dtype, query=False)

        q = _rotated(q_ref[...], scale_q_ref[...], cos_q_ref[...], sin_q_ref[...], static)
        q = _with_mask(q * _q_factor(head_dim), ids_q_ref[...], q_ref.dtype, query=True)
        highest = jnp.full((block, 1), -jnp.inf, jnp.float32)
        total = jnp.zeros((block, LANES), jnp.float32)
        out = jnp.zeros((block, head_dim), jnp.float32)
        following = _dot(q, keys[chunks[0], :], (1, 1))
        for n, rows in enumerate(chunks):
            scores = following
            if n + 1 < len(chunks):  # asked for now, so that the matrix unit has work below
                following = _dot(q, keys[chunks[n + 1], :], (1, 1))
            before = highest
            highest = jnp.maximum(
                before, jnp.max(_fold(jnp.maximum, scores), axis=1, keepdims=True)
            )
            p = jnp.exp2(scores - highest)
            shrink = jnp.exp2(before - highest)
            total = total * shrink + _fold(jnp.add, p)
            out = out * shrink + _dot(p.astype(v_ref.dtype), v_ref[rows, :], (1, 0))
        total = jnp.sum(total, axis=1, keepdims=True)
        out_ref[...] = (out / total).astype(out_ref.dtype)
        lse = jnp.broadcast_to(highest + jnp.log2(total), (block, LANES))
        lse_ref[...] = lse.T[:1]

    return _call(
        kernel,
        (q, k, v, scale_q, scale_k, cos, sin, cos, sin, ids, ids),
        kinds=(
            "query", "key", "key", "scale", "scale", "query place", "query place", "key place",
            "key place", "query id", "key id",
        ),
        outputs=("query", "row"),
        scratch_shapes=[pltpu.VMEM((num_tokens, LANES), k.dtype)],
        block=block,
        name="flash_forward",
        interpret=static.interpret,
    )  # fmt: skip


def _backward(q, k, v, scale_q, scale_k, cos, sin, ids, do, lse, delta, static):
    (num_tokens, head_dim), (block, chunks) = q.shape[2:], _blocks(q.shape[2])
    last = (q.shape[1] // k.shape[1] - 1, num_tokens // block - 1)

    def kernel(
        q_ref, k_ref, v_ref, scale_q_ref, scale_k_ref, cos_q_ref, sin_q_ref, cos_k_ref, sin_k_ref,
        ids_q_ref, ids_k_ref, do_ref, lse_ref, delta_ref,
        dq_ref, dk_ref, dv_ref, dscale_q_ref, dscale_k_ref, keys, dk, dv,
    ):  # fmt: skip
        place = pl.program_id(2), pl.program_id(3)

        @pl.when((place[0] == 0) & (place[1] == 0))
        def _():
            dk[...] = jnp.zeros_like(dk)
            dv[...] = jnp.zeros_like(dv)
            dscale_q_ref[...] = jnp.zeros_like(dscale_q_ref)
            for rows in chunks:
                turned = _rotated(
                    k_ref[rows, :], scale_k_ref[...], cos_k_ref[rows, :], sin_k_ref[rows, :], static
                )
                keys[rows, :] = _with_mask(turned, ids_k_ref[rows, :], k_ref.dtype, query=False)

        turned = _rotated(q_ref[...], scale_q_ref[...], cos_q_ref[...], sin_q_ref[...], static)
        q = _with_mask(turned * _q_factor(head_dim), ids_q_ref[...], q_ref.dtype, query=True)
        do, lse, delta = do_ref[...], lse_ref[...], delta_ref[...]
        dq = jnp.zeros((block, LANES), jnp.float32)
        for rows in chunks:
            key = keys[rows, :]
            # Transposed, [keys, queries]: then only dq needs a transposed operand.
            p = jnp.exp2(_dot(key, q, (1, 1)) - lse)
            dv[rows, :] += _dot(p.astype(do.dtype), do, (1, 0))
            ds = (p * (_dot(v_ref[rows, :], do, (1, 1)) - delta)).astype(q.dtype)
            dk[rows, :] += _dot(ds, q, (1, 0))
            dq += _dot(ds, key, (0, 0))
        dq = dq[:, :head_dim] * (math.log(2) * _q_factor(head_dim))
        dx, dscale = _rotated_backward(
            dq, q_ref[...], scale_q_ref[...], cos_q_ref[...], sin_q_ref[...], static
        )
        dq_ref[...] = dx.astype(dq_ref.dtype)
        dscale_q_ref[...] += dscale

        @pl.when((place[0] == last[0]) & (place[1] == last[1]))
        def _():
            total = jnp.zeros((1, head_dim), jnp.float32)
            for rows in chunks:
                dx, dscale = _rotated_backward(
                    dk[rows, :head_dim] * math.log(2),
                    k_ref[rows, :],
                    scale_k_ref[...],
                    cos_k_ref[rows, :],
                    sin_k_ref[rows, :],
                    static,
                )
                dk_ref[rows, :] = dx.astype(dk_ref.dtype)
                total += dscale
            dscale_k_ref[...] = total
            dv_ref[...] = dv[...].astype(dv_ref.dtype)

    return _call(
        kernel,
        (q, k, v, scale_q, scale_k, cos, sin, cos, sin, ids, ids, do, lse, delta),
        kinds=(
            "query", "key", "key", "scale", "scale", "query place", "query place", "key place",
            "key place", "query id", "key id", "query", "row", "row",
        ),
        outputs=("query", "key", "key", "part", "part"),
        scratch_shapes=[
            pltpu.VMEM((num_tokens, LANES), k.dtype),
            pltpu.VMEM((num_tokens, LANES), jnp.float32),
            pltpu.VMEM((num_tokens, head_dim), jnp.float32),
        ],
        block=block,
        name="flash_backward",
        interpret=static.interpret,
    )  # fmt: skip


def _q_factor(head_dim: int) -> float:
    return math.log2(math.e) / math.sqrt(head_dim)


def _dot(a, b, contract):
    """The matrix product that sums over one dim of each, in float32."""
    dims = (contract[:1], contract[1:])
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (dims, ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def _fold(op, x):
    """[n, m * LANES] to [n, LANES]; what is left for the slow way across lanes is done once."""
    return functools.reduce(op, [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)])


def _partners(x):
    """(-b, a) of each pair (a, b) of features: a product with a signed permutation, so exact."""
    size = x.shape[1]
    row = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    even = column % 2 == 0
    minus, plus = even & (row == column + 1), ~even & (row == column - 1)
    matrix = jnp.where(plus, 1.0, jnp.where(minus, -1.0, 0.0)).astype(x.dtype)
    return _dot(x, matrix, (1, 0))


def _inverse_rms(x, eps):
    return jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + eps)


def _rotated(x, scale, cos, sin, static):
    """rotate(rms_norm(x) * scale), float32; rounded to x's type where layers.RMSNorm does."""
    wide = x.astype(jnp.float32)
    normed = (wide * _inverse_rms(wide, static.eps)).astype(x.dtype)
    scaled = (normed.astype(jnp.float32) * scale.astype(x.dtype).astype(jnp.float32)).astype(
        x.dtype
    )
    return scaled.astype(jnp.float32) * cos + _partners(scaled) * sin


def _rotated_backward(gradient, x, scale, cos, sin, static):
    """From the gradient of `_rotated`: that of x, and that of scale, summed over rows [1, d]."""
    wide = x.astype(jnp.float32)
    inverse = _inverse_rms(wide, static.eps)
    normed = wide * inverse
    # The permutation is its own inverse but for the sign.
    back = gradient * cos - _partners((gradient * sin).astype(x.dtype))
    dscale = jnp.sum(back * normed, axis=0, keepdims=True)
    back = back * scale.astype(jnp.float32)
    dx = inverse * (back - normed * jnp.mean(back * normed, axis=1, keepdims=True))
    return dx, dscale


def _with_mask(x, ids, dtype, *, query: bool):
    """[n, d] to [n, LANES], with the lanes that make products across segments -BIG."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], LANES), 1)
    wide = jnp.pad(x, ((0, 0), (0, LANES - x.shape[1])))
    for n, segment in enumerate(SEGMENTS):
        if query:
            value = jnp.where(ids == segment, 0.0, -_BIG)
        else:  # keys of nobody are for no query
            value = jnp.where((ids == segment) | (ids < 0), 1.0, 0.0)
        wide = jnp.where(lanes == x.shape[1] + n, value, wide)
    return wide.astype(dtype)


def _call(kernel, inputs, *, kinds, outputs, block, name, interpret, scratch_shapes):
    """Runs a kernel over (batch, key head, query head of it, block of queries).

    What it sees of an array depends on its kind: of a `query` array a block [block, d], of a `key`
    array all tokens [T, d]; of what all heads share (`place`, `id`) the rows of these; of a `row`
    array, a number for each query, [1, block]; of a `part` array, one for each key head, [1, d].
    """
    (batch, num_heads, num_tokens, head_dim), num_kv_heads = inputs[0].shape, inputs[1].shape[1]
    group = num_heads // num_kv_heads

    def spec(shape, index):
        return pl.BlockSpec(shape, index)

    specs = {
        "query": spec((None, None, block, head_dim), lambda b, h, g, i: (b, h * group + g, i, 0)),
        "key": spec((None, None, num_tokens, head_dim), lambda b, h, g, i: (b, h, 0, 0)),
        "row": spec((None, None, 1, block), lambda b, h, g, i: (b, h * group + g, 0, i)),
        "part": spec((None, None, 1, head_dim), lambda b, h, g, i: (b, h, 0, 0)),
        "scale": spec((1, head_dim), lambda b, h, g, i: (0, 0)),
        "query place": spec((None, block, head_dim), lambda b, h, g, i: (b, i, 0)),
        "key place": spec((None, num_tokens, head_dim), lambda b, h, g, i: (b, 0, 0)),
        "query id": spec((None, block, 1), lambda b, h, g, i: (b, i, 0)),
        "key id": spec((None, num_tokens, 1), lambda b, h, g, i: (b, 0, 0)),
    }
    dtype = inputs[0].dtype
    shapes = {
        "query": jax.ShapeDtypeStruct((batch, num_heads, num_tokens, head_dim), dtype),
        "key": jax.ShapeDtypeStruct((batch, num_kv_heads, num_tokens, head_dim), dtype),
        "row": jax.ShapeDtypeStruct((batch, num_heads, 1, num_tokens), jnp.float32),
        "part": jax.ShapeDtypeStruct((batch, num_kv_heads, 1, head_dim), jnp.float32),
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
