"""From latents, times and caption features to tokens, and from tokens back to latents.

Axes: B batch, h w latent height and width, C latent channels, p patch, N image slots,
P = p * p * C, A width of the condition, S caption slots, F text features, D model width.
"""

import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import nnx
from jaxtyping import Array, Float

from lumina_jax.models.layers import RMSNorm
from lumina_jax.types import ImageTokens


def patchify(latents: Float[Array, "B h w C"], patch_size: int, num_slots: int) -> ImageTokens:
    """Cuts latents into tokens in raster order, padded with zeros to `num_slots`.

    Inside a token the channel runs fastest, then the column, then the row, as in the reference.
    """
    batch, height, width, _ = latents.shape
    rows, columns = height // patch_size, width // patch_size
    if (rows * patch_size, columns * patch_size) != (height, width) or rows * columns > num_slots:
        raise ValueError(
            f"Latents of {height} x {width} do not cut into at most {num_slots} patches of "
            f"{patch_size} x {patch_size}."
        )
    tokens = rearrange(latents, "B (r p) (c q) C -> B (r c) (p q C)", p=patch_size, q=patch_size)
    pad = num_slots - rows * columns
    grid = np.indices((rows, columns)).reshape(2, -1)
    place = np.pad(
        np.broadcast_to(grid[:, None], (2, batch, rows * columns)), ((0, 0),) * 2 + ((0, pad),)
    )
    mask = np.broadcast_to(np.arange(num_slots) < rows * columns, (batch, num_slots))
    return ImageTokens(
        tokens=jnp.pad(tokens, ((0, 0), (0, pad), (0, 0))),
        rows=jnp.asarray(place[0], jnp.int32),
        columns=jnp.asarray(place[1], jnp.int32),
        mask=jnp.asarray(mask),
    )


def unpatchify(
    tokens: Float[Array, "B N P"], patch_size: int, height: int, width: int
) -> Float[Array, "B h w C"]:
    """Latents of `height` x `width` from their tokens in raster order; padding is dropped."""
    rows, columns = height // patch_size, width // patch_size
    return rearrange(
        tokens[:, : rows * columns],
        "B (r c) (p q C) -> B (r p) (c q) C",
        r=rows,
        c=columns,
        p=patch_size,
        q=patch_size,
    )


def pool_latents(latents: Float[Array, "B h w C"], factor: int = 4) -> Float[Array, "B i j C"]:
    """Averages windows of `factor` x `factor` latents; an incomplete window is dropped.

    The low-resolution view of the auxiliary loss (paper equation 4).
    """
    height, width = (size // factor * factor for size in latents.shape[1:3])
    return reduce(
        latents[:, :height, :width], "B (i a) (j b) C -> B i j C", "mean", a=factor, b=factor
    )


class TimestepEmbedder(nnx.Module):
    """The condition of a time in [0, 1]: sinusoids, then two linear layers.

    t is not multiplied by 1000, so every sinusoid is slow and t lives in the small sines. float32
    throughout: bfloat16 would keep eight bits of it.
    """

    num_frequencies = 128

    def __init__(self, cfg, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        inputs = 2 * self.num_frequencies
        self.hidden = nnx.Linear(inputs, cfg.cond_dim, kernel_init=init, rngs=rngs)
        self.out = nnx.Linear(cfg.cond_dim, cfg.cond_dim, kernel_init=init, rngs=rngs)

    def __call__(self, t: Float[Array, " B"]) -> Float[Array, "B A"]:
        rates = np.exp(-np.log(10000) * np.arange(self.num_frequencies) / self.num_frequencies)
        angles = t.astype(jnp.float32)[:, None] * jnp.asarray(rates, jnp.float32)[None]
        waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return self.out(nnx.silu(self.hidden(waves)))


class CaptionEmbedder(nnx.Module):
    """Normalises the text encoder's features and maps them to the model's width."""

    def __init__(self, cfg, *, rngs: nnx.Rngs):
        self.norm = RMSNorm(cfg.cap_feat_dim, eps=cfg.norm_eps)
        self.linear = nnx.Linear(
            cfg.cap_feat_dim,
            cfg.dim,
            kernel_init=nnx.initializers.normal(0.02),
            dtype=cfg.dtype,
            rngs=rngs,
        )

    def __call__(self, cap_feats: Float[Array, "B S F"]) -> Float[Array, "B S D"]:
        return self.linear(self.norm(cap_feats))
