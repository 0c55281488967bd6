"""The frozen programs of training: host batches in, `Batch` on the mesh out.

The text encoder is one program; the autoencoder with the cut into tokens is a small one for each
bucket shape, compiled when first met. Behind it every bucket looks alike. A host batch may bring
cached `latents` or `cap_feats` instead of what they are made from: then that program does not run,
and its weights are never read.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lumina_jax import sharding
from lumina_jax.executables import Program
from lumina_jax.frozen.autoencoder import Autoencoder
from lumina_jax.frozen.text_encoder import TextEncoder
from lumina_jax.models import embed
from lumina_jax.types import Batch, ImageTokens


class Encoder:
    """encode(host_batch, index) -> Batch; returns while the device still works.

    Args:
      text_encoder: Its programs.
      autoencoder: Likewise.
      text_params: Gives those of the text encoder, on the mesh; called by batches that need them.
      image_params: Likewise, those of the autoencoder.
      mesh: The batch is split over it.
      batch_size: Of the global batch.
      patch_size: Of the model.
      num_slots: Image slots of a sequence.
      pooled: Whether to make the pooled pictures of the auxiliary loss too.
      seed: Of latents that are drawn (`autoencoder.sample`); batch k always draws the same.
      settings: Gives all that decides the programs, for those that are kept.

    Attributes:
      encode_text: encode_text(params, ids, mask) -> cap_feats, jitted.
      encode_images: encode_images(params, images, key, index) -> (image, pooled), likewise.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        autoencoder: Autoencoder,
        *,
        text_params: Callable[[], Any],
        image_params: Callable[[], Any],
        mesh: jax.sharding.Mesh,
        batch_size: int,
        patch_size: int,
        num_slots: int,
        pooled: bool,
        seed: int,
        settings: Callable[[], Any],
    ):
        self._sharding = sharding.named(mesh, ("act_batch",))
        self._batch_size = batch_size
        self._text_params, self._image_params = text_params, image_params
        self._key = jax.random.key(seed)
        cut = functools.partial(
            cut_latents, patch_size=patch_size, num_slots=num_slots, pooled=pooled
        )

        def encode_images(params, images, key, index):
            return cut(autoencoder.encode(params, images, jax.random.fold_in(key, index)))

        program = functools.partial(
            Program, settings=settings, returns=(ImageTokens,), out_shardings=self._sharding
        )

        def encode_text(params, ids, mask):
            # float32 also where the encoder computes in less: a cache must not make a difference.
            return text_encoder.encode(params, ids, mask).astype(jnp.float32)

        self.encode_text = program(encode_text, name="encode_text")
        self._widen_text = program(lambda x: x.astype(jnp.float32), name="widen_text")
        self.encode_images = program(encode_images, name="encode_images")
        self._cut_latents = program(cut, name="cut_latents")

    def __call__(self, host_batch: dict, index: int) -> Batch:
        mask = self._put(host_batch["token_mask"])
        if "cap_feats" in host_batch:
            cap_feats = self._widen_text(self._put(host_batch["cap_feats"]))
        else:
            ids = self._put(host_batch["token_ids"])
            cap_feats = self.encode_text(self._text_params(), ids, mask)
        if "latents" in host_batch:
            image, pooled = self._cut_latents(self._put(host_batch["latents"]))
        else:
            images = self._put(host_batch["images"])
            image, pooled = self.encode_images(self._image_params(), images, self._key, index)
        return Batch(image, pooled, cap_feats, mask)

    def _put(self, rows):
        """The global array of which these rows are this process's share."""
        return jax.make_array_from_process_local_data(
            self._sharding, rows, (self._batch_size, *rows.shape[1:])
        )


def cut_latents(latents, *, patch_size, num_slots, pooled):
    """Latents to padded tokens, and the tokens of their pooled latents where asked for."""
    latents = latents.astype(jnp.float32)
    tokens = embed.patchify(latents, patch_size, num_slots)
    if not pooled:
        return tokens, None
    return tokens, embed.patchify(embed.pool_latents(latents), patch_size, num_slots // 16)
