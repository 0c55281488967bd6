"""Between pictures and the latents that the model works on.

Axes: B batch, H W picture height and width, h w latent height and width, C latent channels.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, UInt8

from lumina_jax import sharding
from lumina_jax.errors import InputError
from lumina_jax.models import vae
from lumina_jax.untrusted import read_json
from lumina_jax.weights import convert, files
from lumina_jax.weights import vae as names
from lumina_jax.weights.vae import CONFIG_FILE, WEIGHTS_FILE


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

    def placed_params(self, mesh: jax.sharding.Mesh) -> PyTree:
        """Shapes and types of the weights, and where they lie on the mesh."""
        ...

    def check_weights(self) -> None:
        """Refuses files that do not hold the weights, by names, shapes and types; reads none."""
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

    def placed_params(self, mesh: jax.sharding.Mesh) -> PyTree:
        del mesh
        return ()

    def check_weights(self) -> None:
        pass  # there are none

    def fingerprint(self) -> str:
        return "pixels"

    def encode(
        self, params: PyTree, images: UInt8[Array, "B H W 3"], key: PRNGKeyArray
    ) -> Float[Array, "B H W 3"]:
        del params, key
        return signed(images)

    def decode(self, params: PyTree, latents: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        del params
        return latents


class VAE:
    """The autoencoder of FLUX.1 and Lumina-Image 2.0, or a small one made by `train_vae`.

    Args:
      path: A diffusers pipeline (with vae/), a folder with config.json and weights, the name of
        such a repository on the Hugging Face hub, or the workdir of `train_vae`.
      dtype: Of kernels and computation, "bfloat16" or "float32".
      sample: Whether latents are drawn, as in diffusers' scripts, or the likeliest, as in the
        official training.

    Attributes:
      folder: Where config and weights are.
      cfg: The sizes.
    """

    def __init__(self, path: str, *, dtype: str = "bfloat16", sample: bool = False):
        if not path:
            raise InputError(
                "autoencoder.path is empty. The autoencoder 'vae' needs a local folder or a name "
                "on the Hugging Face hub, such as Alpha-VLLM/Lumina-Image-2.0, or the workdir of a "
                "run of lumina_jax.train_vae."
            )
        self.folder = _find_folder(path)
        config = read_json(self.folder / CONFIG_FILE, "Copy it again.")
        self.cfg = vae.VAEConfig.from_json(config, dtype=dtype)
        self.downscale, self.channels = self.cfg.downscale, self.cfg.latent_channels
        self._sample = sample

    @classmethod
    def of_released_sizes(cls, *, dtype: str, sample: bool):
        """One without files, whose programs can be compiled: it cannot read weights."""
        autoencoder = cls.__new__(cls)
        autoencoder.cfg = vae.VAEConfig.preset("flux", dtype=dtype)
        autoencoder.downscale = autoencoder.cfg.downscale
        autoencoder.channels = autoencoder.cfg.latent_channels
        autoencoder._sample = sample
        return autoencoder

    def abstract_params(self) -> PyTree:
        """Shapes and types of the weights."""

        def held(path, x):  # norms and biases stay float32: they are few, and read as such
            kernel = path[-1].key == "kernel"
            return jax.ShapeDtypeStruct(x.shape, self.cfg.dtype if kernel else x.dtype)

        return jax.tree_util.tree_map_with_path(held, vae.abstract_params(self.cfg))

    def placed_params(self, mesh: jax.sharding.Mesh) -> PyTree:
        return sharding.placed(self.abstract_params(), mesh, sharding.VAE_RULES)

    def load_params(self, mesh: jax.sharding.Mesh) -> PyTree:
        abstract = self.abstract_params()
        shardings = sharding.tree_shardings(abstract, mesh, sharding.VAE_RULES)
        with self._open_weights() as weights:
            return convert.load(weights, names.tensors(self.cfg), abstract, shardings)

    def check_weights(self) -> None:
        with self._open_weights() as weights:
            convert.check(weights, names.tensors(self.cfg))

    def fingerprint(self) -> str:
        settings = [dataclasses.asdict(self.cfg), self._sample]
        digest = hashlib.sha256(json.dumps(settings).encode())
        with self._open_weights() as weights:
            digest.update(files.fingerprint(weights).encode())
        return f"vae {digest.hexdigest()}"

    def encode(
        self, params: PyTree, images: UInt8[Array, "B H W 3"], key: PRNGKeyArray
    ) -> Float[Array, "B h w C"]:
        with jax.default_matmul_precision(self.cfg.dtype):
            return vae.encode(self.cfg, params, signed(images), key if self._sample else None)

    def decode(self, params: PyTree, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        with jax.default_matmul_precision(self.cfg.dtype):
            return vae.decode(self.cfg, params, latents)

    def _open_weights(self) -> files.Weights:
        # A folder of the hub may have the same weights in other precisions beside it.
        file = self.folder / WEIGHTS_FILE
        return files.open_weights(file if file.exists() else self.folder)


def signed(images: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Bytes as numbers in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def _find_folder(path: str) -> pathlib.Path:
    folder = files.part_of(path, "vae")
    if not (folder / CONFIG_FILE).exists():
        has = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise InputError(
            f"{folder} is no autoencoder: it has no {CONFIG_FILE} but {has}. Give a folder with "
            f"vae/ in it, or one with {CONFIG_FILE} and {WEIGHTS_FILE}. A run of "
            f"lumina_jax.train_vae writes vae/ when it ends."
        )
    return folder


KINDS = ("pixels", "vae")


def make_autoencoder(
    kind: str, *, path: str = "", dtype: str = "bfloat16", sample: bool = False
) -> Autoencoder:
    """The autoencoder that a config names.

    Args:
      kind: One of KINDS.
      path: Of vae: where its files are.
      dtype: Of vae: "bfloat16" or "float32". Pixels are float32 always.
      sample: Of vae: whether latents are drawn.
    """
    if kind == "vae":
        return VAE(path, dtype=dtype, sample=sample)
    if kind == "pixels":
        if path or sample:
            raise InputError(
                f"autoencoder.path={path!r} and autoencoder.sample={sample} are given, but the "
                f"autoencoder 'pixels' has no weights and nothing to draw. Leave them '' and False,"
                f" or set autoencoder.kind to vae."
            )
        return Pixels()
    raise InputError(f"autoencoder.kind={kind!r} is not one of {', '.join(KINDS)}.")
