"""From prompts to pictures, in one call.

pipeline = Pipeline.from_checkpoint("runs/tiny")
pipeline(["dog face"])[0].save("dog.png")
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from PIL import Image

from lumina_jax import checkpoint, compiler, sharding, system_prompts
from lumina_jax.errors import InputError
from lumina_jax.executables import Program
from lumina_jax.frozen.autoencoder import VAE, Autoencoder, make_autoencoder
from lumina_jax.frozen.gemma2 import Gemma2TextEncoder
from lumina_jax.frozen.text_encoder import TextEncoder, make_text_encoder
from lumina_jax.models.next_dit import NextDiTConfig, abstract_params, make_forward
from lumina_jax.sampling import sampler
from lumina_jax.sampling.sampler import SamplerConfig
from lumina_jax.weights import diffusers
from lumina_jax.weights.next_dit import open_transformer

OUTPUTS = ("pil", "uint8", "float")
# Caption slots of a call are a multiple of this, or all that the text encoder has.
SLOTS_STEP = 64


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
        self.draw = Program(
            functools.partial(
                _draw, make_forward(model), text_encoder, autoencoder, model.patch_size
            ),
            name="draw",
            settings=lambda: {
                "model": dataclasses.asdict(model),
                "text_encoder": text_encoder.fingerprint(),
                "autoencoder": autoencoder.fingerprint(),
            },
            out_shardings=replicated,
            compiler_options=compiler.options(sharding.device_kind(mesh)),
        )

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

        A text encoder or autoencoder that is not the one of the training is an InputError.
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
        return cls(model, params, **parts, mesh=mesh)

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
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_truncation: float | None = None,
        guidance_renorm: float | None = None,
        semantics: str | None = None,
        solver: str | None = None,
        time_shift: float | None = None,
        system_prompt: str | None = None,
        seed: int | Sequence[int] = 0,
        latents: np.ndarray | jax.Array | None = None,
        output: str = "pil",
    ) -> list[Image.Image] | np.ndarray:
        """Draws one picture for each prompt; what is not named comes from the checkpoint's config.

        Args:
          prompts: One prompt or several.
          negative_prompt: What guidance leads away from, one for all or one for each.
          height: In pixels, a multiple of the model's patch in pixels.
          width: Likewise.
          num_steps: See SamplerConfig, as for the six settings after it.
          guidance_scale: 1 follows the prompt alone.
          guidance_truncation: 1 guides to the end.
          guidance_renorm: 0 is off.
          semantics: "official" or "diffusers".
          solver: A name in lumina_jax.sampling.solvers.
          time_shift: 1 spends the steps evenly, more spends them near noise.
          system_prompt: A name in lumina_jax.system_prompts, put before each prompt; and before
            each negative prompt that is not empty, with official semantics.
          seed: Of the first prompt's noise, one more for each prompt after it; or one for each. A
            picture depends on its own seed and prompt, not on its neighbours.
          latents: Noise to begin from instead, [len(prompts), h, w, C].
          output: "pil", a list of pictures; "uint8" or "float", an array NHWC, float in [0, 1].
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise InputError("No prompt was given: pass at least one (the empty string is one).")
        if output not in OUTPUTS:
            raise InputError(f"output={output!r} is not one of {', '.join(OUTPUTS)}.")
        settings = {
            "num_steps": num_steps,
            "guidance_scale": guidance_scale,
            "guidance_truncation": guidance_truncation,
            "guidance_renorm": guidance_renorm,
            "semantics": semantics,
            "solver": solver,
            "time_shift": time_shift,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        config = dataclasses.replace(self.defaults, **given)
        height = self.size[0] if height is None else height
        width = self.size[1] if width is None else width
        self.check_size(height, width)
        negatives = _one_for_each(negative_prompt or "", prompts, "negative_prompt")
        prompts, negatives = self._with_system_prompt(
            prompts, negatives, system_prompt or self.system_prompt, config.semantics
        )
        if latents is None:
            latents = self._noise(_seeds(seed, prompts), height, width)
        else:
            latents = self._check_latents(latents, len(prompts), height, width)

        # The mesh splits a batch evenly; the last prompt fills it up and is cut off again.
        num, shards = len(prompts), sharding.batch_shards(self.mesh)
        fill = -num % shards
        filled = (texts + texts[-1:] * fill for texts in (prompts, negatives))
        tokens = self._tokenize([text for texts in filled for text in texts])
        latents = jnp.concatenate([latents, jnp.repeat(latents[-1:], fill, axis=0)])
        inputs = jax.device_put((latents, *tokens), sharding.named(self.mesh, ("act_batch",)))
        with jax.set_mesh(self.mesh):
            images = self.draw(
                self.params, self.text_params, self.autoencoder_params, *inputs, config.numbers(),
                program=config.program(), num=num,
            )  # fmt: skip
        images = np.asarray(images.addressable_data(0))
        if output == "float":
            return images
        images = np.round(images * 255).astype(np.uint8)
        return images if output == "uint8" else [Image.fromarray(image) for image in images]

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

    def _tokenize(self, texts):
        before = self._text_encoder.num_truncated
        tokens = self._text_encoder.tokenize(texts)
        if cut := self._text_encoder.num_truncated - before:
            logging.warning(
                "%d of %d prompts were longer than %d tokens; their ends are ignored.",
                cut, len(texts), self._text_encoder.max_tokens,
            )  # fmt: skip
        # Padding changes no picture and costs as much as tokens do, so most of it is left out. What
        # is kept comes in steps, so that few programs serve prompts of all lengths.
        ids, mask = tokens
        slots = -(-int(mask.sum(axis=1).max()) // SLOTS_STEP) * SLOTS_STEP
        return ids[:, :slots], mask[:, :slots]


def from_sections(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a pipeline needs besides the model, from the sections of a run's config."""
    sampling = dict(config["sampling"])
    return {
        "text_encoder": make_text_encoder(**config["text_encoder"]),
        "autoencoder": make_autoencoder(**config["autoencoder"]),
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
    forward, text_encoder, autoencoder, patch_size,
    params, text_params, autoencoder_params, latents, token_ids, token_mask, numbers,
    *, program, num,
):  # fmt: skip
    """The one program: captions, loop, decoder. Images in [0, 1].

    The tokens are those of the prompts, then those of the negative prompts. `num` pictures are
    returned; what filled the batch up stays on its devices.
    """
    # float32 as in training, where they may come from a cache.
    cap_feats = text_encoder.encode(text_params, token_ids, token_mask).astype(jnp.float32)
    caption, negative = zip(jnp.split(cap_feats, 2), jnp.split(token_mask, 2), strict=True)
    latents = sampler.sample(
        forward, params, latents, caption, negative, numbers, patch_size=patch_size, program=program
    )
    images = autoencoder.decode(autoencoder_params, latents)[:num]
    return jnp.clip((images + 1) / 2, 0, 1)


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
