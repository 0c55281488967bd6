"""The programs of a run, lowered for TPUs that are not at hand: step, sampler, frozen encoders.

They are the very functions that training and sampling jit. Only arrays and weights are missing, so
nothing is downloaded: an encoder has the sizes that a local folder gives it, or the released ones.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lumina_jax import compiler, sharding, train
from lumina_jax.data.records import num_tokens
from lumina_jax.errors import InputError
from lumina_jax.frozen.autoencoder import VAE, Autoencoder, make_autoencoder
from lumina_jax.frozen.encoder import Encoder
from lumina_jax.frozen.gemma2 import Gemma2TextEncoder
from lumina_jax.frozen.text_encoder import TextEncoder, make_text_encoder
from lumina_jax.models import gemma2, next_dit, vae
from lumina_jax.sampling.pipeline import Pipeline, typed
from lumina_jax.sampling.sampler import SamplerConfig
from lumina_jax.types import Batch, ImageTokens

# Names of weights whose sizes are known here.
RELEASED = {
    "text_encoder": ("Alpha-VLLM/Lumina-Image-2.0", "google/gemma-2-2b"),
    "autoencoder": ("Alpha-VLLM/Lumina-Image-2.0", "black-forest-labs/FLUX.1-dev"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lowered:
    """A program, ready to be compiled.

    Attributes:
      name: What it does.
      lowered: Of jax.
      flops: Operations asked for, on all chips; no recomputation.
      num_images: Pictures that one run of it learns from, makes or encodes.
      inputs: Bytes on a chip of each kind of input.
      sequences: Lengths of the sequences in which tokens attend to each other.
      compiler_options: That it is compiled with.
      taken: How often the layers run that a condition may skip, as a share.
    """

    name: str
    lowered: jax.stages.Lowered
    flops: float
    num_images: int
    inputs: Mapping[str, int]
    sequences: tuple[int, ...]
    compiler_options: Mapping[str, str]
    taken: float = 1.0


def lower_train(
    config: ConfigDict, mesh: jax.sharding.Mesh, text_slots: int | None = None
) -> Lowered:
    """The step of training; `text_slots` of a caption, all that the encoder gives by default."""
    text_encoder, autoencoder = encoders(config)
    model = train.model_config(config, text_encoder, autoencoder)
    train.check_batch_size(config, mesh)
    slots = num_tokens(config.data.resolution, autoencoder.downscale * model.patch_size)
    text_slots = text_slots or text_encoder.max_tokens
    program = train.step_program(config, model, mesh, slots)
    state = sharding.placed(program.abstract_state, mesh)
    batch_size = config.train.batch_size
    batch = abstract_batch(config, model, mesh, slots, text_slots)
    with jax.set_mesh(mesh):
        lowered = program.step.lower(state, batch, _key(mesh))
    return Lowered(
        name="train",
        lowered=lowered,
        flops=train.step_flops(config, model, slots, text_slots),
        num_images=batch_size,
        inputs={
            "parameters": sharding.device_bytes(state.params),
            "average": sharding.device_bytes(state.ema),
            "optimizer": sharding.device_bytes(state.opt_state),
            "batch": sharding.device_bytes(batch),
        },
        sequences=_sequences(
            [slots, slots // 16] if config.flow.auxiliary_weight else [slots], text_slots
        ),
        compiler_options=compiler.options(
            sharding.device_kind(mesh), config.compile.options.to_dict()
        ),
    )


def abstract_batch(
    config: ConfigDict,
    model: next_dit.NextDiTConfig,
    mesh: jax.sharding.Mesh,
    num_slots: int,
    text_slots: int,
) -> Batch:
    """Shapes, types and places of what the step takes."""

    def array(*shape, dtype=jnp.float32):
        return _split(mesh, (config.train.batch_size, *shape), dtype)

    def tokens(num):
        return ImageTokens(
            tokens=array(num, model.patch_dim),
            rows=array(num, dtype=jnp.int32),
            columns=array(num, dtype=jnp.int32),
            mask=array(num, dtype=bool),
        )

    return Batch(
        image=tokens(num_slots),
        pooled=tokens(num_slots // 16) if config.flow.auxiliary_weight else None,
        cap_feats=array(text_slots, model.cap_feat_dim),
        cap_mask=array(text_slots, dtype=bool),
    )


def lower_sample(
    config: ConfigDict, mesh: jax.sharding.Mesh, num_images: int, text_slots: int | None = None
) -> Lowered:
    """The sampler of `num_images` pictures, with captions and decoder, all in bfloat16."""
    text_encoder, autoencoder = encoders(config)
    _with_weights(text_encoder, autoencoder)
    model = train.model_config(config, text_encoder, autoencoder)
    text_slots = text_slots or text_encoder.max_tokens
    settings = config.sampling.to_dict()
    height, width = settings.pop("height"), settings.pop("width")
    prompt, defaults = settings.pop("system_prompt"), SamplerConfig(**settings)
    pipeline = Pipeline(
        model, None, text_encoder=text_encoder, autoencoder=autoencoder, defaults=defaults,
        size=(height, width), system_prompt=prompt, mesh=mesh,
    )  # fmt: skip
    shards = sharding.batch_shards(mesh)
    if num_images < 1 or num_images % shards:
        raise InputError(
            f"--batch_size={num_images} pictures do not split over {shards} part(s) of the mesh; "
            f"give a multiple of {shards}."
        )
    params = typed(next_dit.abstract_params(model), model.dtype)
    params = sharding.placed(params, mesh)
    text_params = text_encoder.placed_params(mesh)
    image_params = autoencoder.placed_params(mesh)
    h, w = height // autoencoder.downscale, width // autoencoder.downscale
    if defaults.cache_threshold:
        raise InputError(
            f"sampling.cache_threshold={defaults.cache_threshold} skips what the picture allows, "
            f"which no plan can know. Plan a fixed interval: --config.sampling.cache_interval=2 "
            f"--config.sampling.cache_threshold=0."
        )
    path = pipeline.path(height, width, defaults)
    guided = path.program.num_guided > 0
    noise = _split(mesh, (num_images, h, w, autoencoder.channels), jnp.float32)
    # The negative prompt is empty, and has a slot for its one token.
    slots = (text_slots, 1)
    texts = [
        (_split(mesh, (num_images, num), jnp.int32), _split(mesh, (num_images, num), bool))
        for num in slots[: 1 + guided]
    ]
    numbers = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.named(mesh, ())),
        jax.eval_shape(lambda: jax.tree.map(jnp.asarray, path.numbers)),
    )
    with jax.set_mesh(mesh):
        lowered = pipeline.draw.lower(
            params, text_params, image_params, noise, texts, numbers, None,
            program=path.program, num=num_images,
        )  # fmt: skip
    unit = pipeline.pixels_per_token
    flops = path.flops(model, height=height // unit, width=width // unit, slots=slots)
    flops += sum(gemma2.forward_flops(text_encoder.cfg, num) for num in slots[: 1 + guided])
    flops += vae.forward_flops(autoencoder.cfg, height, width)[1]
    return Lowered(
        name="sample",
        lowered=lowered,
        flops=float(flops * num_images),
        num_images=num_images,
        inputs={
            "parameters": sharding.device_bytes(params),
            "text encoder": sharding.device_bytes(text_params),
            "autoencoder": sharding.device_bytes(image_params),
            "batch": sharding.device_bytes((noise, texts)),
        },
        sequences=_sequences([height * width // unit**2], text_slots),
        compiler_options=compiler.options(sharding.device_kind(mesh)),
        taken=1.0 if path.numbers.cache is None else float(np.mean(path.numbers.cache.forced)),
    )


def lower_encode(config: ConfigDict, mesh: jax.sharding.Mesh) -> list[Lowered]:
    """The frozen programs of a training batch: text, and pictures of the square bucket."""
    text_encoder, autoencoder = encoders(config)
    _with_weights(text_encoder, autoencoder)
    model = train.model_config(config, text_encoder, autoencoder)
    train.check_batch_size(config, mesh)
    side, batch_size = config.data.resolution, config.train.batch_size
    text_params = text_encoder.placed_params(mesh)
    image_params = autoencoder.placed_params(mesh)
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
        settings=dict,
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
            flops=float(batch_size * gemma2.forward_flops(text_encoder.cfg, slots)),
            num_images=batch_size,
            inputs={
                "text encoder": sharding.device_bytes(text_params),
                "batch": sharding.device_bytes((ids, mask)),
            },
            sequences=(slots,),
            compiler_options={},
        ),
        Lowered(
            name="encode images",
            lowered=pictures,
            flops=float(batch_size * vae.forward_flops(autoencoder.cfg, side, side)[0]),
            num_images=batch_size,
            inputs={
                "autoencoder": sharding.device_bytes(image_params),
                "batch": sharding.device_bytes(images),
            },
            sequences=((side // autoencoder.downscale) ** 2,),
            compiler_options={},
        ),
    ]


def encoders(config: ConfigDict) -> tuple[TextEncoder, Autoencoder]:
    """Those that a config names, without weights."""
    text, image = config.text_encoder.to_dict(), config.autoencoder.to_dict()
    if text["kind"] == "gemma2" and _is_released("text_encoder", text["path"]):
        del text["kind"], text["path"]
        text_encoder = Gemma2TextEncoder.of_released_sizes(**text)
    else:
        text_encoder = make_text_encoder(**text)
    if image["kind"] == "vae" and _is_released("autoencoder", image["path"]):
        del image["kind"], image["path"]
        return text_encoder, VAE.of_released_sizes(**image)
    return text_encoder, make_autoencoder(**image)


def _sequences(images: list[int], text: int) -> tuple[int, ...]:
    """Pictures alone and text alone in the refiners, joined in the layers."""
    return tuple(sorted({text, *images, *(image + text for image in images)}))


def _is_released(section: str, path: str) -> bool:
    """Whether a path names the released weights, and not a folder whose config can be read."""
    if path in ("", *RELEASED[section]):
        return True
    if not epath.Path(path).exists():
        raise InputError(
            f"config.{section}.path={path!r} is no folder here, and planning downloads nothing. "
            f"Name a local folder, whose sizes are read, or plan with the released sizes: "
            f"{' or '.join(RELEASED[section])}."
        )
    return False


def _with_weights(text_encoder: TextEncoder, autoencoder: Autoencoder) -> None:
    if not isinstance(text_encoder, Gemma2TextEncoder) or not isinstance(autoencoder, VAE):
        raise InputError(
            "--what=sample and --what=encode plan the frozen encoders gemma2 and vae; the others "
            "are small. Set --config.text_encoder.kind=gemma2 and --config.autoencoder.kind=vae, "
            "or plan --what=train."
        )


def _split(mesh, shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named(mesh, ("act_batch",)))


def _key(mesh):
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.named(mesh, ()))
