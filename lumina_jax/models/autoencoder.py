"""Between pictures and the latents that the model works on.

Axes: B batch, H W picture height and width, h w latent height and width, C latent channels.
"""

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from lumina_jax.errors import InputError


@runtime_checkable
class Autoencoder(Protocol):
    """What every picture codec offers; its parameters travel apart, so that jit can shard them."""

    downscale: int  # pixels to a latent, along each side
    channels: int  # of the latents
    params: Any

    def encode(self, params: Any, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        """Latents of about unit scale."""

    def decode(self, params: Any, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Images in [-1, 1], not clipped."""


class Pixels:
    """No compression: the latents are the pixels in [-1, 1]. For small pictures."""

    downscale = 1
    channels = 3
    params = ()

    def encode(self, params: Any, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        del params
        return images.astype(jnp.float32) / 127.5 - 1

    def decode(self, params: Any, latents: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        del params
        return latents


AUTOENCODERS = {"pixels": Pixels}


def make_autoencoder(kind: str) -> Autoencoder:
    """The autoencoder that `config.autoencoder.kind` names."""
    if kind not in AUTOENCODERS:
        raise InputError(f"autoencoder.kind={kind!r} is not one of {', '.join(AUTOENCODERS)}.")
    return AUTOENCODERS[kind]()
