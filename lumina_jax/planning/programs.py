"""The programs of a run, lowered for TPUs that are not at hand: step, sampler, frozen encoders.

They are the very functions that training and sampling jit. Only arrays and weights are missing, so
nothing is read or downloaded; an encoder whose files would say its sizes has those of the released
one.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lumina_jax import sharding, train
from lumina_jax.data.records import num_tokens
from lumina_jax.frozen.autoencoder import VAE, Autoencoder, make_autoencoder
from lumina_jax.frozen.encoder import Encoder
from lumina_jax.frozen.gemma2 import Gemma2TextEncoder
from lumina_jax.frozen.text_encoder import TextEncoder, make_text_encoder
from lumina_jax.models import gemma2, next_dit, vae
from lumina_jax.sampling.pipeline import Pipeline, typed
from lumina_jax.sampling.sampler import SamplerConfig
from lumina_jax.types import Batch, ImageTokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lowered:
    """A program, ready to be compiled.

    Attributes:
      name: What it does.
      lowered: Of jax.
      flops: Operations asked for, on all chips; no recomputation.
      num_images: Pictures that one run of it learns from, makes or encodes.
      inputs: Bytes on a chip of each kind of input.
    """

    name: str
    lowered: jax.stages.Lowered
    flops: float
    num_images: int
    inputs: Mapping[str, int]


def lower_train(
    config: ConfigDict, mesh: jax.sharding.Mesh, text_slots: int | None = None
) -> Lowered:
    """The step of training; `text_slots` of a caption, all that the encoder gives by default."""
    text_encoder, autoencoder = _encoders(config)
    model = train.model_config(config, text_encoder, autoencoder)
    train.check_batch_size(config, mesh)
    slots = num_tokens(config.data.resolution, autoencoder.downscale * model.patch_size)
    text_slots = text_slots or text_encoder.max_tokens
    program = train.step_program(config, model, mesh, slots)
    state = _placed(program.abstract_state, program.shardings)
    batch_size = config.train.batch_size

    def array(*shape, dtype=jnp.float32):
        return _split(mesh, (batch_size, *shape), dtype)

    def tokens(num):
        return ImageTokens(
            tokens=array(num, model.patch_dim),
            rows=array(num, dtype=jnp.int32),
            columns=array(num, dtype=jnp.int32),
            mask=array(num, dtype=bool),
        )

    batch = Batch(
        image=tokens(slots),
        pooled=tokens(slots // 16) if config.flow.auxiliary_weight else None,
        cap_feats=array(text_slots, model.cap_feat_dim),
        cap_mask=array(text_slots, dtype=bool),
    )
    with jax.set_mesh(mesh):
        lowered = program.step.lower(state, batch, _key(mesh))
    return Lowered(
        name="train",
        lowered=lowered,
        flops=train.step_flops(config, model, slots, text_slots),
        num_images=batch_size,
        inputs={
            "parameters": _bytes(state.params),
            "average": _bytes(state.ema),
            "optimizer": _bytes(state.opt_state),
            "batch": _bytes(batch),
        },
    )


def lower_sample(
    config: ConfigDict, mesh: jax.sharding.Mesh, num_images: int, text_slots: int | None = None
) -> Lowered:
    """The sampler of `num_images` pictures, with captions and decoder, all in bfloat16."""
    text_encoder, autoencoder = _encoders(config)
    model = train.model_config(config, text_encoder, autoencoder)
    text_slots = text_slots or text_encoder.max_tokens
    settings = config.sampling.to_dict()
    height, width = settings.pop("height"), settings.pop("width")
    prompt, defaults = settings.pop("system_prompt"), SamplerConfig(**settings)
    pipeline = Pipeline(
        model, None, text_encoder=text_encoder, autoencoder=autoencoder, defaults=defaults,
        size=(height, width), system_prompt=prompt, mesh=mesh,
    )  # fmt: skip
    params = typed(next_dit.abstract_params(model), model.dtype)
    params = _placed(params, sharding.tree_shardings(params, mesh))
    text_params, image_params = _encoder_params(text_encoder, autoencoder, mesh)
    h, w = height // autoencoder.downscale, width // autoencoder.downscale
    batch = (
        _split(mesh, (num_images, h, w, autoencoder.channels), jnp.float32),
        _split(mesh, (2 * num_images, text_slots), jnp.int32),
        _split(mesh, (2 * num_images, text_slots), bool),
    )
    numbers = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.named(mesh, ())),
        jax.eval_shape(lambda: jax.tree.map(jnp.asarray, defaults.numbers())),
    )
    with jax.set_mesh(mesh):
        lowered = pipeline.draw.lower(
            params, text_params, image_params, *batch, numbers,
            program=defaults.program(), num=num_images,
        )  # fmt: skip
    image_tokens = height * width // pipeline.pixels_per_token**2
    forwards = len(defaults.numbers().times) + defaults.num_guided()
    flops = forwards * next_dit.forward_flops(model, image_tokens, text_slots)
    flops += 2 * _text_flops(text_encoder, text_slots)
    flops += _image_flops(autoencoder, height, width)[1]
    return Lowered(
        name="sample",
        lowered=lowered,
        flops=float(flops * num_images),
        num_images=num_images,
        inputs={
            "parameters": _bytes(params),
            "text encoder": _bytes(text_params),
            "autoencoder": _bytes(image_params),
            "batch": _bytes(batch),
        },
    )


def lower_encode(config: ConfigDict, mesh: jax.sharding.Mesh) -> list[Lowered]:
    """The frozen programs of a training batch: text, and pictures of the square bucket."""
    text_encoder, autoencoder = _encoders(config)
    model = train.model_config(config, text_encoder, autoencoder)
    train.check_batch_size(config, mesh)
    side, batch_size = config.data.resolution, config.train.batch_size
    text_params, image_params = _encoder_params(text_encoder, autoencoder, mesh)
    encoder = Encoder(
        text_encoder,
        autoencoder,
        text_params=lambda: text_params,
        image_params=lambda: image_params,
        mesh=mesh,
        batch_size=batch_size,
        patch_size=model.patch_size,
        num_slots=num_tokens(side, autoencoder.downscale * model.patch_size),
        pooled=bool(config.flow.auxiliary_weight),
        seed=config.seed,
    )
    slots = text_encoder.max_tokens
    ids = _split(mesh, (batch_size, slots), jnp.int32)
    mask = _split(mesh, (batch_size, slots), bool)
    images = _split(mesh, (batch_size, side, side, 3), jnp.uint8)
    index = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.named(mesh, ()))
    with jax.set_mesh(mesh):
        text = encoder.encode_text.lower(text_params, ids, mask)
        pictures = encoder.encode_images.lower(image_params, images, _key(mesh), index)
    return [
        Lowered(
            name="encode text",
            lowered=text,
            flops=float(batch_size * _text_flops(text_encoder, slots)),
            num_images=batch_size,
            inputs={"text encoder": _bytes(text_params), "batch": _bytes((ids, mask))},
        ),
        Lowered(
            name="encode images",
            lowered=pictures,
            flops=float(batch_size * _image_flops(autoencoder, side, side)[0]),
            num_images=batch_size,
            inputs={"autoencoder": _bytes(image_params), "batch": _bytes(images)},
        ),
    ]


def _encoders(config: ConfigDict) -> tuple[TextEncoder, Autoencoder]:
    text, image = config.text_encoder.to_dict(), config.autoencoder.to_dict()
    if text["kind"] == "gemma2":
        del text["kind"], text["path"]
        text_encoder = Gemma2TextEncoder.of_released_sizes(**text)
    else:
        text_encoder = make_text_encoder(**text)
    if image["kind"] == "vae":
        del image["kind"], image["path"]
        return text_encoder, VAE.of_released_sizes(**image)
    return text_encoder, make_autoencoder(**image)


def _encoder_params(text_encoder, autoencoder, mesh):
    found = []
    for encoder, rules in (
        (text_encoder, sharding.GEMMA2_RULES),
        (autoencoder, sharding.VAE_RULES),
    ):
        abstract = encoder.abstract_params()
        found.append(_placed(abstract, sharding.tree_shardings(abstract, mesh, rules)))
    return found


def _text_flops(text_encoder, num_tokens: int) -> int:
    return gemma2.forward_flops(text_encoder.cfg, num_tokens)


def _image_flops(autoencoder, height: int, width: int) -> tuple[int, int]:
    return vae.forward_flops(autoencoder.cfg, height, width)


def _placed(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )


def _split(mesh, shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named(mesh, ("act_batch",)))


def _key(mesh):
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.named(mesh, ()))


def _bytes(tree: Any) -> int:
    """Of the part on one chip."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
