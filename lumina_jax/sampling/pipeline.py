"""From prompts to pictures, in one call.

pipeline = Pipeline.from_checkpoint("runs/tiny")
pipeline(["dog face"])[0].save("dog.png")
"""

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from einops import reduce
from etils import epath
from PIL import Image

from lumina_jax import checkpoint, compiler, sharding, system_prompts
from lumina_jax.errors import InputError
from lumina_jax.executables import Program
from lumina_jax.frozen.autoencoder import VAE, Autoencoder, make_autoencoder
from lumina_jax.frozen.gemma2 import Gemma2TextEncoder
from lumina_jax.frozen.text_encoder import TextEncoder, make_text_encoder
from lumina_jax.models import rope
from lumina_jax.models.embed import pool_latents
from lumina_jax.models.next_dit import NextDiTConfig, abstract_params, make_stages
from lumina_jax.sampling import caching, sampler
from lumina_jax.sampling.calibration import FILE_NAME, Calibration
from lumina_jax.sampling.sampler import SamplerConfig
from lumina_jax.weights import diffusers
from lumina_jax.weights.next_dit import open_transformer

OUTPUTS = ("pil", "uint8", "float")
# Caption slots are a multiple of this, or one, or all that the text encoder has: few programs serve
# prompts of all lengths.
SLOTS_STEP = 32
# A server may be asked for any size and any number of steps; so many programs stay in memory.
MOST_PROGRAMS = 64
# Previews are at most so many pixels wide and high.
PREVIEW_SIDE = 256

Picture = Image.Image | np.ndarray


class Pipeline:
    """A model with its text encoder, its autoencoder and the sampling settings it was made with.

    Attributes:
      params: Of the model, placed on `mesh`; may be replaced by others of the same shapes.
      defaults: Sampling settings that a call does not name.
      size: (height, width) of a picture, in pixels, when a call does not name it.
      system_prompt: Name of the text in front of a prompt, see lumina_jax.system_prompts.
      draw: The jitted program of a call: captions, loop and decoder.
    """

    def __init__(
        self,
        model: NextDiTConfig,
        params: Any,
        *,
        text_encoder: TextEncoder,
        autoencoder: Autoencoder,
        defaults: SamplerConfig,
        size: tuple[int, int],
        system_prompt: str,
        mesh: jax.sharding.Mesh,
    ):
        self.params = params
        self.defaults = defaults
        self.size = size
        self.system_prompt = system_prompt
        self.mesh = mesh
        self._model = model
        self._listener: Callable | None = None  # of previews
        self._text_encoder = text_encoder
        self._autoencoder = autoencoder
        replicated = sharding.named(mesh, ())
        self.check_size(*size)
        for what, given, needed in (
            ("text encoder", text_encoder.feature_dim, model.cap_feat_dim),
            ("autoencoder", autoencoder.channels, model.in_channels),
        ):
            if given != needed:
                raise InputError(
                    f"This {what} gives {given} numbers where the model takes {needed}: they do "
                    f"not belong together."
                )
        draw = functools.partial(_draw, model, text_encoder, autoencoder)
        options = {
            "settings": lambda: {
                "model": dataclasses.asdict(model),
                "text_encoder": text_encoder.fingerprint(),
                "autoencoder": autoencoder.fingerprint(),
            },
            "returns": (sampler.Trace, caching.Record),
            "most": MOST_PROGRAMS,
            "out_shardings": replicated,
            "compiler_options": compiler.options(sharding.device_kind(mesh)),
        }
        self.draw = Program(draw, name="draw", **options)
        self._draw_watched = Program(
            functools.partial(draw, show=self._show),
            name="draw_watched",
            calls_host=True,
            **options,
        )

    @classmethod
    def open(
        cls,
        path: str,
        *,
        step: int | None = None,
        weights: str | None = None,
        dtype: str | None = None,
        text_encoder_path: str | None = None,
        autoencoder_path: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "Pipeline":
        """`from_checkpoint` of a run, `from_diffusers` of anything else; None is their default.

        What only the other of them takes is an InputError.
        """
        of_folder = {"dtype": dtype}
        of_run = {
            "step": step, "weights": weights, "text_encoder_path": text_encoder_path,
            "autoencoder_path": autoencoder_path,
        }  # fmt: skip
        is_run = checkpoint.is_run(path)
        make, taken, other = cls.from_diffusers, of_folder, of_run
        if is_run:
            make, taken, other = cls.from_checkpoint, of_run, of_folder
        if wrong := [f"{name}={value}" for name, value in other.items() if value is not None]:
            kinds = ("a diffusers pipeline", "the workdir of a run")
            raise InputError(
                f"{', '.join(wrong)}: that is for {kinds[not is_run]}, and {path} is "
                f"{kinds[is_run]}. Leave it out."
            )
        given = {name: value for name, value in taken.items() if value is not None}
        return make(path, mesh=mesh, **given)

    @classmethod
    def from_checkpoint(
        cls,
        path: str,
        *,
        step: int | None = None,
        weights: str = "ema",
        text_encoder_path: str | None = None,
        autoencoder_path: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "Pipeline":
        """The pipeline of a training run.

        Args:
          path: The run's workdir.
          step: Which of its checkpoints; the newest by default.
          weights: "ema", the averaged weights, or "params", the raw ones.
          text_encoder_path: Where its text encoder lies now, if not where the run found it.
          autoencoder_path: Likewise.
          mesh: Where to put the model; one device by default.

        A text encoder or autoencoder that is not the one of the training is an InputError. A
        calibration of the cache that lies in the workdir is used.
        """
        mesh = mesh or sharding.make_mesh(replica=1, data=1, model=1, devices=jax.devices()[:1])
        found = checkpoint.find(path, step)
        meta = checkpoint.load_meta(found)
        config = meta["config"]
        if "sampling" not in config:
            raise InputError(f"{path} is a run of something else: it draws no pictures.")
        for name, place in (
            ("text_encoder", text_encoder_path),
            ("autoencoder", autoencoder_path),
        ):
            if place is not None:
                config[name]["path"] = place
        parts = from_sections(config)
        _check_same_encoders(parts, meta["data"] or {})
        model = NextDiTConfig(**meta["model"])
        abstract = typed(abstract_params(model), checkpoint.dtype_of(found, weights))
        shardings = sharding.tree_shardings(abstract, mesh)
        params = checkpoint.load_params(found, abstract, shardings, weights=weights)
        pipeline = cls(model, params, **parts, mesh=mesh)
        if (epath.Path(path) / FILE_NAME).exists():
            pipeline.use_calibration(path)
        return pipeline

    @classmethod
    def from_diffusers(
        cls,
        path: str,
        *,
        dtype: str = "bfloat16",
        soft_cap: bool = True,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "Pipeline":
        """The pipeline that diffusers keeps in a folder, such as the released Lumina-Image 2.0.

        Args:
          path: Of the folder, or its name on the Hugging Face hub.
          dtype: Of parameters and computation, "bfloat16" or "float32".
          soft_cap: Of the attention of Gemma-2: transformers has it, older versions with SDPA had
            not.
          mesh: Where to put the model; one device by default.

        A call without settings draws as diffusers does: its guidance, grid and 30 steps.
        """
        mesh = mesh or sharding.make_mesh(replica=1, data=1, model=1, devices=jax.devices()[:1])
        folder = diffusers.open_folder(path)
        with open_transformer(folder) as source:
            model = dataclasses.replace(source.cfg, dtype=dtype)
            abstract = typed(abstract_params(model), dtype)
            params = source.load(abstract, sharding.tree_shardings(abstract, mesh))
        sections = released_sections(str(folder), dtype=dtype, soft_cap=soft_cap)
        sections["sampling"] |= diffusers.sampling_section(folder)
        return cls(model, params, **from_sections(sections), mesh=mesh)

    def use_calibration(self, path: epath.PathLike) -> None:
        """Takes the polynomial of `tools/calibrate_cache.py`, from its file or the folder of it."""
        found = Calibration.load(path)
        self.defaults = dataclasses.replace(self.defaults, cache_coefficients=found.coefficients)

    def save_diffusers(self, path: str, *, dtype: str | None = None) -> None:
        """Writes a folder that `diffusers.Lumina2Pipeline.from_pretrained` reads.

        Text encoder, tokenizer and VAE are copied from where they were read, byte by byte.

        Args:
          path: To be made; a folder that has files already is refused.
          dtype: Of the transformer, "float32" or "bfloat16"; that of the parameters by default.
        """
        text_encoder, autoencoder = self._text_encoder, self._autoencoder
        if not isinstance(text_encoder, Gemma2TextEncoder) or not isinstance(autoencoder, VAE):
            raise InputError(
                "A diffusers pipeline has Gemma-2 and a VAE beside the model, and this one "
                f"has {type(text_encoder).__name__} and {type(autoencoder).__name__}. The model "
                "alone can be written with tools/convert_checkpoint.py --format=diffusers."
            )
        diffusers.save_folder(
            path,
            self.params,
            self._model,
            dtype=dtype,
            text_encoder=text_encoder.folders.text_encoder,
            tokenizer=text_encoder.folders.tokenizer,
            vae=autoencoder.folder,
            time_shift=self.defaults.time_shift,
            sample_size=self.size[0] // autoencoder.downscale,
        )

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        system_prompt: str | None = None,
        seed: int | Sequence[int] = 0,
        latents: np.ndarray | jax.Array | None = None,
        image: Picture | Sequence[Picture] | None = None,
        strength: float | None = None,
        mask: Picture | Sequence[Picture] | None = None,
        preview: Callable[[int, int, np.ndarray], None] | None = None,
        output: str = "pil",
        trace: bool = False,
        **settings: Any,
    ) -> list[Image.Image] | np.ndarray | tuple[Any, sampler.Trace | None]:
        """Draws one picture for each prompt; what is not named comes from the checkpoint's config.

        Args:
          prompts: One prompt or several.
          negative_prompt: What guidance leads away from, one for all or one for each.
          height: In pixels, a multiple of the model's patch in pixels.
          width: Likewise.
          system_prompt: A name in lumina_jax.system_prompts, or a text that ends in
            "<Prompt Start>", put before each prompt; and before each negative prompt that is not
            empty, with official semantics.
          seed: Of the first prompt's noise, one more for each prompt after it; or one for each. A
            picture depends on its own seed and prompt, not on its neighbours.
          latents: Noise to begin from instead, [len(prompts), h, w, C].
          image: A picture to begin from, of height x width pixels; one for all or one for each.
          strength: How much of the path is walked anew from there: 1 is all of it, so that nothing
            of the picture is left, and the default with a mask; 0.6 without.
          mask: White, or not 0, where the picture may change; elsewhere it stays as it is, to the
            pixel.
          preview: preview(done, evaluations, images) is called while pictures are drawn, with what
            they look like so far, uint8 [B, H, W, 3], small. It has a program of its own.
          output: "pil", a list of pictures; "uint8" or "float", an array NHWC, float in [0, 1].
          trace: Return also what the cache did in each evaluation; None without a cache.
          **settings: Fields of SamplerConfig: num_steps, solver, guidance_scale, ...
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise InputError("No prompt was given: pass at least one (the empty string is one).")
        if output not in OUTPUTS:
            raise InputError(f"output={output!r} is not one of {', '.join(OUTPUTS)}.")
        config = self.settings(**settings)
        height = self.size[0] if height is None else height
        width = self.size[1] if width is None else width
        self.check_size(height, width)
        start = self._start(image, mask, len(prompts), height, width)
        if start is None and strength is not None:
            raise InputError(f"strength={strength} is given, and no image to begin from.")
        if strength is None:
            strength = 0.6 if start is not None and start[1] is None else 1.0
        path = self.path(height, width, config, strength)
        negatives = _one_for_each(negative_prompt or "", prompts, "negative_prompt")
        prompts, negatives = self._with_system_prompt(
            prompts, negatives, system_prompt or self.system_prompt, config.semantics
        )
        if latents is None:
            latents = self._noise(_seeds(seed, prompts), height, width)
        else:
            latents = self._check_latents(latents, len(prompts), height, width)

        # The mesh splits a batch evenly; the last prompt fills it up and is cut off again. Where
        # prompts and negative prompts fill it together, they go side by side.
        num, shards = len(prompts), sharding.batch_shards(self.mesh)
        guided = path.program.num_guided > 0
        parallel = guided and shards % 2 == 0 and 0 < num % shards <= shards // 2
        fill = -num % (shards // 2 if parallel else shards)
        pairs = [texts + texts[-1:] * fill for texts in (prompts, negatives)]
        texts = self._texts(pairs, guided, parallel, cached=path.numbers.cache is not None)
        filled = jax.tree.map(
            lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], fill, axis=0)]), (latents, start)
        )
        whole, split = sharding.named(self.mesh, ()), sharding.named(self.mesh, ("act_batch",))
        noise, start = jax.device_put(filled, whole if parallel else split)
        static = {
            "program": path.program._replace(parallel=parallel),
            "num": num,
            "stretch": self._stretch(height, width, config),
            "attention_gain": self._attention_gain(height, width, config),
        }
        args = (
            self.params, self.text_params, self.autoencoder_params, noise,
            jax.device_put(texts, split), path.numbers, start,
        )  # fmt: skip
        with jax.set_mesh(self.mesh):
            if preview is None:
                images, found = self.draw(*args, **static)
            else:
                total = path.num_evaluations
                self._listener = lambda index, seen: preview(index + 1, total, seen[:num])
                try:
                    images, found = jax.block_until_ready(self._draw_watched(*args, **static))
                    jax.effects_barrier()
                finally:
                    self._listener = None
        images = np.asarray(images.addressable_data(0))
        if output != "float":
            images = np.round(images * 255).astype(np.uint8)
        if output == "pil":
            images = [Image.fromarray(image) for image in images]
        found = jax.tree.map(lambda x: np.asarray(x.addressable_data(0))[:, :num], found)
        return (images, found) if trace else images

    def settings(self, **given: Any) -> SamplerConfig:
        """The sampling settings of a call: those given, not None, over the checkpoint's."""
        known = {field.name for field in dataclasses.fields(SamplerConfig)}
        if unknown := sorted(set(given) - known):
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" Known: {', '.join(sorted(known))}."
            raise InputError(f"No sampling setting is called {unknown[0]!r}.{hint}")
        given = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self.defaults, **given)

    def path(
        self, height: int, width: int, config: SamplerConfig, strength: float = 1.0
    ) -> sampler.Path:
        """What is known of a picture of this size before it is drawn: its times, its program."""
        num_tokens = height * width // self.pixels_per_token**2
        return config.path(num_tokens, self._model.num_layers, strength)

    def caption_slots(
        self, prompts: Sequence[str], negatives: Sequence[str], system_prompt: str, semantics: str
    ) -> list[tuple[int, ...]]:
        """Of each prompt and its negative prompt: where they are equal, one program serves all."""
        texts = self._with_system_prompt(prompts, negatives, system_prompt, semantics)
        masks = [self._text_encoder.tokenize(part)[1] for part in texts]
        slots = [[min(caption_slots(int(row.sum())), row.size) for row in mask] for mask in masks]
        return list(zip(*slots, strict=True))

    def flops(
        self,
        height: int,
        width: int,
        config: SamplerConfig,
        *,
        slots: tuple[int, int],
        trace: sampler.Trace | None = None,
    ) -> float:
        """Operations of the network for one picture in pixels, see `sampler.Path.flops`."""
        unit = self.pixels_per_token
        return self.path(height, width, config).flops(
            self._model, height=height // unit, width=width // unit, slots=slots, trace=trace
        )

    def fingerprint(self) -> str:
        """Changes with any number of the weights and with the encoders; equal on every mesh.

        All processes of a mesh must ask for it together.
        """
        named, _ = jax.tree_util.tree_flatten_with_path(self.params)
        sums = jax.jit(
            lambda leaves: [_sums_of_bits(x) for x in leaves],
            out_shardings=sharding.named(self.mesh, ()),
        )([x for _, x in named])
        content = [
            [jax.tree_util.keystr(path), x.shape, str(x.dtype), found.addressable_data(0).tolist()]
            for (path, x), found in zip(named, sums, strict=True)
        ]
        encoders = [self._text_encoder.fingerprint(), self._autoencoder.fingerprint()]
        return hashlib.sha256(json.dumps([content, encoders]).encode()).hexdigest()

    def _show(self, index, images):
        """Called by the program that previews are drawn by, in every evaluation."""
        if (listener := self._listener) is not None:
            listener(int(index), np.asarray(images))

    def _stretch(self, height, width, config):
        """For a picture larger than those that the model draws by default."""
        factor = (height * width / (self.size[0] * self.size[1])) ** 0.5
        if config.rope_scaling == "none" or factor <= 1:
            return None
        return rope.Stretch(factor, config.rope_watershed)

    def _attention_gain(self, height, width, config):
        if not config.proportional_attention:
            return 1.0
        trained, now = (h * w // self.pixels_per_token**2 for h, w in (self.size, (height, width)))
        return float(np.sqrt(np.log(now) / np.log(trained))) if now > trained > 1 else 1.0

    def _start(self, image, mask, num, height, width):
        """Pictures to begin from, and masks, as arrays: uint8 [B, H, W, 3], bool [B, H, W, 1]."""
        if image is None:
            if mask is not None:
                raise InputError("A mask is given, and no image that it could be of.")
            return None
        images = _pictures(image, num, height, width, "image", "RGB")
        if mask is None:
            return jnp.asarray(images), None
        masks = _pictures(mask, num, height, width, "mask", "L")[..., None] > 0
        return jnp.asarray(images), jnp.asarray(masks)

    # Both are arguments of the program: a closed-over array would be copied into each one.
    @functools.cached_property
    def text_params(self) -> Any:
        """Of the text encoder on the mesh, read when first needed."""
        return self._text_encoder.load_params(self.mesh)

    @functools.cached_property
    def autoencoder_params(self) -> Any:
        """Of the autoencoder, likewise."""
        return self._autoencoder.load_params(self.mesh)

    @property
    def pixels_per_token(self) -> int:
        """Sides of a picture are multiples of this."""
        return self._autoencoder.downscale * self._model.patch_size

    def check_size(self, height: int, width: int) -> None:
        """Refuses sizes that do not cut into patches."""
        unit = self.pixels_per_token
        for name, size in (("height", height), ("width", width)):
            if size < unit or size % unit:
                low = max(size // unit, 1) * unit
                raise InputError(
                    f"{name}={size} is not a multiple of {unit} pixels, the side of this model's "
                    f"patch; the nearest that are: {low} and {low + unit}."
                )

    def _noise(self, seeds, height, width):
        h, w = height // self._autoencoder.downscale, width // self._autoencoder.downscale
        shape = (h, w, self._autoencoder.channels)
        return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(
            jnp.asarray(seeds, jnp.uint32)
        )

    def _check_latents(self, latents, num, height, width):
        scale = self._autoencoder.downscale
        needed = (num, height // scale, width // scale, self._autoencoder.channels)
        if latents.shape != needed:
            raise InputError(
                f"latents have shape {tuple(latents.shape)}; {num} prompt(s) at {height} x {width} "
                f"pixels need {needed} (batch, height, width, channels)."
            )
        return jnp.asarray(latents, jnp.float32)

    def _with_system_prompt(self, prompts, negatives, name, semantics):
        prompts = [system_prompts.prefixed(prompt, name) for prompt in prompts]
        if semantics == "official":  # diffusers leaves negative prompts as they are
            negatives = [system_prompts.prefixed(text, name) if text else "" for text in negatives]
        return prompts, negatives

    def _texts(self, pairs, guided, parallel, cached):
        """Token ids and masks of each branch: together where both need as many slots, else apart.

        Apart too where each branch is to skip layers on its own.
        """
        prompts, negatives = pairs
        if not guided:
            return [self._tokenize(prompts)]
        ids, mask = self._tokenize(prompts)
        others, other_mask = self._tokenize(negatives)
        if not parallel and (cached or ids.shape != others.shape):
            return [(ids, mask), (others, other_mask)]
        slots = max(ids.shape[1], others.shape[1])

        def both(x, y):
            return np.concatenate([np.pad(z, ((0, 0), (0, slots - z.shape[1]))) for z in (x, y)])

        return [(both(ids, others), both(mask, other_mask))]

    def _tokenize(self, texts):
        before = self._text_encoder.num_truncated
        ids, mask = self._text_encoder.tokenize(texts)
        if cut := self._text_encoder.num_truncated - before:
            logging.warning(
                "%d of %d prompts were longer than %d tokens; their ends are ignored.",
                cut, len(texts), self._text_encoder.max_tokens,
            )  # fmt: skip
        # Padding changes no picture and costs as much as tokens do, so most of it is left out.
        slots = caption_slots(int(mask.sum(axis=1).max()))
        return ids[:, :slots], mask[:, :slots]


def caption_slots(num_tokens: int) -> int:
    """Of a branch whose longest caption has so many tokens; the empty one has one."""
    return 1 if num_tokens == 1 else -(-num_tokens // SLOTS_STEP) * SLOTS_STEP


def from_sections(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a pipeline needs besides the model, from the sections of a run's config."""
    return {
        "text_encoder": make_text_encoder(**config["text_encoder"]),
        "autoencoder": make_autoencoder(**config["autoencoder"]),
        **sampling_settings(config["sampling"]),
    }


def sampling_settings(section: Mapping[str, Any]) -> dict[str, Any]:
    """How a pipeline samples where nobody says otherwise, from the section `sampling`."""
    sampling = dict(section)
    return {
        "size": (sampling.pop("height"), sampling.pop("width")),
        "system_prompt": sampling.pop("system_prompt"),
        "defaults": SamplerConfig(**sampling),
    }


def released_sections(
    path: str, *, dtype: str = "bfloat16", soft_cap: bool = True
) -> dict[str, dict[str, Any]]:
    """The sections of a config for the released model, whose other parts lie at `path`."""
    return {
        "text_encoder": {
            "kind": "gemma2", "path": path, "max_tokens": 256, "dtype": dtype, "soft_cap": soft_cap,
        },
        "autoencoder": {"kind": "vae", "path": path, "dtype": dtype, "sample": False},
        "sampling": {
            "height": 1024, "width": 1024, "num_steps": 30, "guidance_scale": 4.0,
            "guidance_truncation": 1.0, "guidance_renorm": 1.0, "semantics": "diffusers",
            "solver": "euler", "time_shift": 6.0, "system_prompt": "real",
        },
    }  # fmt: skip


def _draw(
    model, text_encoder, autoencoder,
    params, text_params, autoencoder_params, noise, texts, numbers, start,
    *, program, num, stretch=None, attention_gain=1.0, show=None,
):  # fmt: skip
    """The one program: captions, loop, decoder. Images in [0, 1], and what the cache did.

    `num` pictures are returned; what filled the batch up stays on its devices.
    """

    def wide(x):
        """Of as many rows as the devices divide."""
        x = jnp.concatenate([x, x]) if program.parallel else x
        return sharding.constrain(x, ("act_batch",) + (None,) * (x.ndim - 1))

    def decode(latents):
        images = autoencoder.decode(autoencoder_params, wide(latents))[: len(latents)]
        return jnp.clip((images + 1) / 2, 0, 1)

    # float32 as in training, where they may come from a cache.
    captions = [
        (text_encoder.encode(text_params, ids, mask).astype(jnp.float32), mask)
        for ids, mask in texts
    ]
    begin = None
    if start is not None:
        images, mask = start
        scale = autoencoder.downscale
        # The key is for autoencoders that draw their latents: the same start, the same picture.
        latents = autoencoder.encode(autoencoder_params, wide(images), jax.random.key(0))
        repaint = None
        if mask is not None:  # a latent may change if any of its pixels may
            repaint = reduce(
                mask.astype(jnp.float32), "B (h p) (w q) c -> B h w c", "max", p=scale, q=scale
            )
        begin = sampler.Start(latents[: len(images)].astype(jnp.float32), repaint)

    def watch(index, t, latents):
        factor = -(-autoencoder.downscale * max(latents.shape[1:3]) // PREVIEW_SIDE)
        images = decode(pool_latents(latents, factor))
        images = sharding.constrain(jnp.round(images * 255).astype(jnp.uint8), (None,) * 4)
        jax.debug.callback(show, index, images)

    latents, trace = sampler.sample(
        make_stages(model, stretch=stretch, attention_gain=attention_gain),
        params, noise, captions, numbers,
        patch_size=model.patch_size, program=program, start=begin,
        watch=None if show is None else watch,
    )  # fmt: skip
    images = decode(latents)
    if start is not None and start[1] is not None:
        images = jnp.where(start[1], images, start[0].astype(jnp.float32) / 255)
    return images[:num], trace


def _sums_of_bits(x):
    """Two sums over all numbers, modulo 2^32, of their bits scrambled together with their places.

    Scrambling loses nothing, so that a change of one number always shows. Sums of integers do not
    depend on their order, and so not on the mesh.
    """
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    sums = [
        jnp.sum(_scramble(bits ^ _scramble(place + jnp.uint32(offset))), dtype=jnp.uint32)
        for offset in (1, 0x9E3779B9)
    ]
    return jnp.stack(sums)


def _scramble(x):
    """The end of MurmurHash3: one to one, every bit of the result depends on every bit of x."""
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def typed(abstract: Any, dtype: str) -> Any:
    """The same shapes with another type."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract)


def _check_same_encoders(parts, trained):
    """Refuses encoders with other fingerprints than those that the run kept."""
    for name in ("text_encoder", "autoencoder"):
        if name in trained and trained[name] != (found := parts[name].fingerprint()):
            raise InputError(
                f"The {name} is not the one that the model was trained with: {found!r}, needed "
                f"{trained[name]!r}. Give the folder of that one: {name}_path."
            )


def _pictures(given, num, height, width, name, mode):
    """Pictures as one array [num, height, width, ...]; one given serves all."""
    several = isinstance(given, Sequence) or (
        isinstance(given, np.ndarray) and given.ndim == (4 if mode == "RGB" else 3)
    )
    pictures = list(given) if several else [given] * num
    if len(pictures) != num:
        raise InputError(
            f"{name} has {len(pictures)} entries for {num} prompt(s): give one, or one for each."
        )
    found = []
    for picture in pictures:
        if isinstance(picture, Image.Image):
            picture = np.asarray(picture.convert(mode))
        picture = np.asarray(picture)
        if picture.shape[:2] != (height, width) or picture.dtype not in (np.uint8, bool):
            raise InputError(
                f"{name} is {picture.dtype} {picture.shape}; needed: uint8, {height} x {width} "
                f"pixels, as the picture to draw. Resize it, or pass height and width."
            )
        found.append(picture)
    return np.stack(found)


def _one_for_each(value, prompts, name):
    values = [value] * len(prompts) if isinstance(value, str) else list(value)
    if len(values) != len(prompts):
        raise InputError(
            f"{name} has {len(values)} entries for {len(prompts)} prompt(s): give one, or one for "
            f"each."
        )
    return values


def _seeds(seed, prompts):
    if isinstance(seed, int | np.integer):
        seeds = [seed + index for index in range(len(prompts))]
    else:
        seeds = list(seed)
    if len(seeds) != len(prompts):
        raise InputError(
            f"seed has {len(seeds)} entries for {len(prompts)} prompt(s): give one, or one for "
            f"each."
        )
    if outside := [number for number in seeds if not 0 <= number < 2**32]:
        raise InputError(f"seed {outside[0]} is not between 0 and {2**32 - 1}.")
    return seeds
