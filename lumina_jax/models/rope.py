"""Rotary positions with three axes: caption index, picture row, picture column.

A head's features come in pairs (2k, 2k + 1). Each axis owns a run of pairs and turns pair k by
position * theta ** (-2k / axis_dim). The angles are computed, not looked up: there is no table to
fall off the end of, where a gather would silently clamp.

Axes: B batch, H heads, T tokens, A position axes, d features of a head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lumina_jax import sharding


class Freqs(NamedTuple):
    """Cosine and sine of each token's angles, every angle twice: once for each half of a pair."""

    cos: Float[Array, "B T d"]
    sin: Float[Array, "B T d"]


def caption_ids(cap_mask: Bool[Array, "B S"]) -> Int[Array, "B S A"]:
    """Positions of caption slots: (i, 0, 0)."""
    index = jnp.broadcast_to(jnp.arange(cap_mask.shape[1]), cap_mask.shape)
    zero = jnp.zeros_like(index)
    return jnp.stack([index, zero, zero], axis=-1)


def image_ids(
    cap_mask: Bool[Array, "B S"], rows: Int[Array, "B N"], columns: Int[Array, "B N"]
) -> Int[Array, "B N A"]:
    """Positions of image slots: (caption length, row, column).

    The caption length is that of the sample, so a picture begins where its own caption ends
    (`Lumina2RotaryPosEmbed` of diffusers, `patchify_and_embed` of the official model.py).
    """
    length = jnp.sum(cap_mask, axis=1, keepdims=True, dtype=rows.dtype)
    return jnp.stack([jnp.broadcast_to(length, rows.shape), rows, columns], axis=-1)


class Stretch(NamedTuple):
    """Rows and columns for a picture `factor` times as large along a side as trained on.

    At t < watershed, where the layout is made, positions are divided by the factor: no angle is
    new. After it theta is multiplied, which turns the slow pairs less and leaves the fast ones, and
    with them the detail, alone. (Lumina-Next, arXiv 2406.18583, "time-aware scaled RoPE": its
    `precompute_freqs_cis`, on two axes of three here.)
    """

    factor: float
    watershed: float


def frequencies(
    positions: Int[Array, "B T A"],
    axes_dims: tuple[int, ...],
    theta: float,
    stretch: Stretch | None = None,
    t: Float[Array, " B"] | None = None,
) -> Freqs:
    """The rotation of each token; a stretched one depends on the time."""

    def rates(axis, dim):
        plain = jnp.asarray(_rates(dim, theta))[None, None]
        if stretch is None or axis == 0:  # the caption's index has the range it always had
            return plain
        early = (t < stretch.watershed)[:, None, None]
        late = jnp.asarray(_rates(dim, theta * stretch.factor))[None, None]
        return jnp.where(early, plain / stretch.factor, late)

    angles = [
        positions[..., axis, None].astype(jnp.float32) * rates(axis, dim)
        for axis, dim in enumerate(axes_dims)
    ]
    # float32: bfloat16 cannot hold odd positions above 256, and the rotation would jitter.
    angles = jnp.concatenate(angles, axis=-1)
    return Freqs(jnp.cos(angles), jnp.sin(angles))


def _rates(dim: int, theta: float) -> np.ndarray:
    pair = np.arange(dim // 2, dtype=np.float64)
    return np.repeat(theta ** (-2 * pair / dim), 2).astype(np.float32)


def rotate(x: Float[Array, "B H T d"], freqs: Freqs) -> Float[Array, "B H T d"]:
    """Turns each pair (a, b) into (a cos - b sin, b cos + a sin), in float32."""
    if sharding.platform() == "tpu":
        # A product with a signed permutation: exact, and far cheaper there than slicing out every
        # other lane.
        partner = jnp.einsum(
            "bhtd,de->bhte",
            x,
            _partners(x.shape[-1]).astype(x.dtype),
            precision=jax.lax.Precision.HIGHEST,
        )
    else:
        partner = jnp.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    cos, sin = freqs.cos[:, None], freqs.sin[:, None]
    turned = x.astype(jnp.float32) * cos + partner.astype(jnp.float32) * sin
    return turned.astype(x.dtype)


def _partners(dim: int) -> np.ndarray:
    matrix = np.zeros((dim, dim), np.float32)
    even = np.arange(0, dim, 2)
    matrix[even + 1, even] = -1
    matrix[even, even + 1] = 1
    return matrix
