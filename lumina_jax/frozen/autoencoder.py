"""Between pictures and the latents that the model works on.

Axes: B batch, H W picture height and width, h w latent height and width, C latent channels.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, UInt8

from lumina_jax.errors import InputError


@runtime_checkable
class Autoencoder(Protocol):
    """What every picture codec offers; its parameters travel apart, so that jit can shard them.

    Attributes:
      downscale: Pixels to a latent, along each side.
      channels: Of the latents.
    """

    downscale: int
    channels: int

    def load_params(self, mesh: jax.sharding.Mesh) -> PyTree:
        """The weights, read and placed on the mesh."""
        ...

    def fingerprint(self) -> str:
        """Changes with anything that changes the latents: weights, sizes, precision."""
        ...

    def encode(
        self, params: PyTree, images: UInt8[Array, "B H W 3"], key: PRNGKeyArray
    ) -> Float[Array, "B h w C"]:
        """Latents of about unit scale; `key` is for those that are drawn, not the likeliest."""
        ...

    def decode(self, params: PyTree, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Images in [-1, 1], not clipped."""
        ...


class Pixels:
    """No compression: the latents are the pixels in [-1, 1]. For small pictures."""

    downscale = 1
    channels = 3

    def load_params(self, mesh: jax.sharding.Mesh) -> PyTree:
        del mesh
        return ()

    def fingerprint(self) -> str:
        return "pixels"

    def encode(
        self, params: PyTree, images: UInt8[Array, "B H W 3"], key: PRNGKeyArray
    ) -> Float[Array, "B H W 3"]:
        del params, key
        return images.astype(jnp.float32) / 127.5 - 1

    def decode(self, params: PyTree, latents: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        del params
        return latents


AUTOENCODERS = {"pixels": Pixels}


def make_autoencoder(kind: str) -> Autoencoder:
    """The autoencoder that `config.autoencoder.kind` names."""
    if kind not in AUTOENCODERS:
        raise InputError(f"autoencoder.kind={kind!r} is not one of {', '.join(AUTOENCODERS)}.")
    return AUTOENCODERS[kind]()
