"""Attention: the one door to every kernel, and the layer that calls it.

Axes: B batch, T tokens, D model width, H query heads, K key and value heads, d features of a head.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lumina_jax import sharding
from lumina_jax.models import rope
from lumina_jax.models.layers import Projection, RMSNorm


def attention(
    q: Float[Array, "B H T d"],
    k: Float[Array, "B K T d"],
    v: Float[Array, "B K T d"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B H T d"]:
    """softmax(q k^T / sqrt(d)) v among the tokens of the same segment.

    Padding is a segment of its own (0), so that no softmax is empty. Key head j serves the query
    heads j * H / K to (j + 1) * H / K - 1.
    """
    mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    # jax.nn wants heads behind tokens; XLA folds these transposes into its matrix products.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(jax.nn.dot_product_attention(q, k, v, mask=mask), 1, 2)


class JointAttention(nnx.Module):
    """Grouped-query attention with normalised queries and keys, rotated by position."""

    def __init__(self, cfg, *, rngs: nnx.Rngs):
        heads = (cfg.num_heads, cfg.head_dim)
        kv_heads = (cfg.num_kv_heads, cfg.head_dim)
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
        q = rope.rotate(self.q_norm(self.q(x)), freqs)
        k = rope.rotate(self.k_norm(self.k(x)), freqs)
        v = self.v(x)
        q, k, v = (sharding.constrain(y, ("act_batch", "act_heads", None, None)) for y in (q, k, v))
        return self.out(attention(q, k, v, segment_ids))
