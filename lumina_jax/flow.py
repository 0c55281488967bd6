"""Rectified flow: a straight path from noise to data, and the loss that learns its velocity.

    x_t = (1 - t) * noise + t * latents        t = 0 is noise, t = 1 is data
    velocity = dx_t / dt = latents - noise

Lumina counts time this way and feeds t to the network as it is. Diffusers and FLUX count the other
way round (sigma = 1 - t), so a formula taken from them needs t -> 1 - t and velocity -> -velocity.

Axes: B batch, N image slots, P numbers in a patch.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lumina_jax.errors import InputError

TIME_DISTRIBUTIONS = ("logit_normal", "uniform")


def sample_times(
    key: PRNGKeyArray, batch: int, *, distribution: str, shift: float
) -> Float[Array, " B"]:
    """Times to train at. Logit-normal draws the middle of the path most, where it is hardest."""
    check_distribution(distribution)
    if distribution == "logit_normal":
        t = jax.nn.sigmoid(jax.random.normal(key, (batch,)))
    else:
        t = jax.random.uniform(key, (batch,))
    return shift_times(t, shift)


def check_distribution(name: str) -> None:
    """Refuses a name that `sample_times` does not know."""
    if name not in TIME_DISTRIBUTIONS:
        raise InputError(
            f"flow.time_distribution={name!r} is not one of {', '.join(TIME_DISTRIBUTIONS)}."
        )


def shift_times(t: Float[Array, " B"], shift: float) -> Float[Array, " B"]:
    """Moves times towards noise: logit(t) falls by log(shift); 1 leaves them."""
    return t / (t + shift * (1 - t))


def resolution_shift(num_tokens: int) -> float:
    """The shift for pictures of `num_tokens` tokens: the more they are, the more noise they stand.

    exp(mu) with mu on the line through 0.5 at 256 tokens and 1.15 at 4096 (official transport
    code). The tokens are those of the resolution, not of the bucket.
    """
    return math.exp(0.5 + (num_tokens - 256) * (1.15 - 0.5) / (4096 - 256))


def interpolate(
    latents: Float[Array, "B N P"], noise: Float[Array, "B N P"], t: Float[Array, " B"]
) -> Float[Array, "B N P"]:
    """The point x_t on the path."""
    t = t[:, None, None]
    return (1 - t) * noise + t * latents


def loss(
    velocity: Float[Array, "B N P"],
    latents: Float[Array, "B N P"],
    noise: Float[Array, "B N P"],
    mask: Bool[Array, "B N"],
) -> Float[Array, " B"]:
    """Squared error of each picture, the mean over its own tokens: all shapes weigh alike."""
    error = jnp.mean(jnp.square(velocity - (latents - noise)), axis=-1)
    return jnp.sum(error * mask, axis=-1) / jnp.sum(mask, axis=-1)
