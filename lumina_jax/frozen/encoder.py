"""The frozen programs of training: host batches in, `Batch` on the mesh out.

The text encoder is one program; the autoencoder with the cut into tokens is a small one for each
bucket shape, compiled when first met. Behind it every bucket looks alike.
"""

import functools
from typing import Any

import jax

from lumina_jax import sharding
from lumina_jax.frozen.autoencoder import Autoencoder
from lumina_jax.frozen.text_encoder import TextEncoder
from lumina_jax.models import embed
from lumina_jax.types import Batch


class Encoder:
    """encode(host_batch, index) -> Batch; returns while the device still works.

    Args:
      text_encoder: Its programs.
      autoencoder: Likewise.
      params: Those of the text encoder and of the autoencoder, on the mesh.
      mesh: The batch is split over it.
      batch_size: Of the global batch.
      patch_size: Of the model.
      num_slots: Image slots of a sequence.
      pooled: Whether to make the pooled pictures of the auxiliary loss too.
      seed: Of latents that are drawn (`autoencoder.sample`); batch k always draws the same.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        autoencoder: Autoencoder,
        params: tuple[Any, Any],
        *,
        mesh: jax.sharding.Mesh,
        batch_size: int,
        patch_size: int,
        num_slots: int,
        pooled: bool,
        seed: int,
    ):
        self._sharding = sharding.named(mesh, ("act_batch",))
        self._batch_size = batch_size
        self._text_params, self._image_params = params
        self._key = jax.random.key(seed)
        self._encode_text = jax.jit(text_encoder.encode, out_shardings=self._sharding)
        self._encode_images = jax.jit(
            functools.partial(
                encode_images,
                autoencoder,
                patch_size=patch_size,
                num_slots=num_slots,
                pooled=pooled,
            ),
            out_shardings=self._sharding,
        )

    def __call__(self, host_batch: dict, index: int) -> Batch:
        images, ids, mask = (
            jax.make_array_from_process_local_data(
                self._sharding, host_batch[name], (self._batch_size, *host_batch[name].shape[1:])
            )
            for name in ("images", "token_ids", "token_mask")
        )
        image, pooled = self._encode_images(self._image_params, images, self._key, index)
        return Batch(image, pooled, self._encode_text(self._text_params, ids, mask), mask)


def encode_images(
    autoencoder: Autoencoder, params, images, key, index, *, patch_size, num_slots, pooled
):
    """Pictures to padded tokens, and the tokens of their pooled latents where asked for."""
    latents = autoencoder.encode(params, images, jax.random.fold_in(key, index))
    tokens = embed.patchify(latents, patch_size, num_slots)
    if not pooled:
        return tokens, None
    return tokens, embed.patchify(embed.pool_latents(latents), patch_size, num_slots // 16)
