"""Solvers of dx/dt = velocity(x, t) from noise (t = 0) to data (t = 1)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Velocity = Callable[[Float[Array, "B h w C"], Float[Array, ""]], Float[Array, "B h w C"]]


def euler(
    velocity: Velocity, latents: Float[Array, "B h w C"], times: Float[Array, " points"]
) -> Float[Array, "B h w C"]:
    """One evaluation an interval; exact where the velocity is constant."""

    def interval(x, ends):
        start, stop = ends
        return x + (stop - start) * velocity(x, start), None

    latents, _ = jax.lax.scan(interval, latents, jnp.stack([times[:-1], times[1:]], axis=1))
    return latents


SOLVERS = {"euler": euler}
