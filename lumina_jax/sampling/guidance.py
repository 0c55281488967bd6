"""Classifier-free guidance, and the renormalisation that keeps it from burning colours.

    velocity = unconditional + scale * (conditional - unconditional)

The official code and diffusers agree on this line and differ on what follows; both are here under
their names (`semantics`).

Axes: B batch, h w latent height and width, C latent channels.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def guide(
    conditional: Float[Array, "B h w C"],
    unconditional: Float[Array, "B h w C"],
    *,
    scale: Float[Array, ""] | float,
    renorm: Float[Array, ""] | float | None,
    semantics: str,
) -> Float[Array, "B h w C"]:
    """The guided velocity; without `renorm` its norm is left alone."""
    velocity = unconditional + scale * (conditional - unconditional)
    if renorm is None:
        return velocity
    if semantics == "official":
        return clip_norm(velocity, conditional, renorm)
    return match_row_norms(velocity, conditional)


def clip_norm(
    velocity: Float[Array, "B h w C"],
    conditional: Float[Array, "B h w C"],
    limit: Float[Array, ""] | float,
) -> Float[Array, "B h w C"]:
    """Shrinks each picture's velocity to at most `limit` times the conditional norm.

    It never grows. The norm runs over the whole picture, as in the official transport code, which
    is right for a batch of one only.
    """
    norm = _norm(velocity, axis=(1, 2, 3))
    allowed = limit * _norm(conditional, axis=(1, 2, 3))
    return velocity * jnp.where(norm > allowed, allowed / jnp.where(norm > 0, norm, 1), 1)


def match_row_norms(
    velocity: Float[Array, "B h w C"], conditional: Float[Array, "B h w C"]
) -> Float[Array, "B h w C"]:
    """Gives every row of every channel the conditional norm, by shrinking or growing it.

    The norm runs along the width alone: the last dim of diffusers' NCHW latents.
    """
    norm = _norm(velocity, axis=2)
    return velocity * _norm(conditional, axis=2) / jnp.where(norm > 0, norm, 1)


def _norm(x, axis):
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True))
