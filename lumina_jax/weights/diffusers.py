"""The folder of a `diffusers.Lumina2Pipeline`: five parts and an index.

model_index.json    which class reads each part
transformer/        the Unified Next-DiT
text_encoder/       Gemma-2        tokenizer/   its tokenizer
vae/                the autoencoder
scheduler/          the grid of times
"""

import json
import os
import pathlib
import shutil
import uuid
from typing import Any

from lumina_jax import untrusted
from lumina_jax.errors import InputError
from lumina_jax.files import is_remote
from lumina_jax.models.next_dit import NextDiTConfig
from lumina_jax.models.vae import MAX_LEVELS
from lumina_jax.weights import files, next_dit

_REMEDY = "Download all of the pipeline."
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja")
_PIPELINES = ("Lumina2Pipeline", "Lumina2Text2ImgPipeline")  # the second is the older name
_PARTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "Gemma2Model"),
    "tokenizer": ("transformers", "GemmaTokenizerFast"),
    "transformer": ("diffusers", "Lumina2Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
# Settings of the scheduler that make another grid than a fixed shift does.
_OTHER_GRIDS = (
    "use_dynamic_shifting",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "shift_terminal",
    "invert_sigmas",
    "stochastic_sampling",
)
# The oldest release with Lumina2Pipeline and its config as it is today.
_DIFFUSERS_VERSION = "0.33.0"


def open_folder(path: str) -> pathlib.Path:
    """The local folder of a pipeline, after a look at its index."""
    folder = files.local_folder(path, "model_index.json", *(f"{part}/*" for part in _PARTS))
    index = folder / "model_index.json"
    if not index.exists():
        raise InputError(
            f"{folder} is no diffusers pipeline: it has no model_index.json. Give the folder that "
            f"holds {', '.join(_PARTS)}."
        )
    if (name := untrusted.read_json(index, _REMEDY).get("_class_name")) not in _PIPELINES:
        raise InputError(f"{folder} is a {name!r:.60}; needed: {_PIPELINES[0]}.")
    if missing := [part for part in _PARTS if not (folder / part).is_dir()]:
        raise InputError(f"{folder} lacks {', '.join(missing)}. Download all of it.")
    return folder


def sampling_section(folder: pathlib.Path) -> dict[str, Any]:
    """What the parts of a pipeline say of its sampling, as keys of `config.sampling`."""
    scheduler = _json(folder / "scheduler" / "scheduler_config.json")
    odd = [name for name in _OTHER_GRIDS if scheduler.get(name)]
    if scheduler.get("_class_name") != _PARTS["scheduler"][1] or odd:
        raise InputError(
            f"The scheduler of {folder} is {scheduler.get('_class_name')}"
            + "".join(f" with {name}={scheduler[name]}" for name in odd)
            + f"; needed: {_PARTS['scheduler'][1]} with a fixed shift and no other change of its "
            f"grid."
        )
    transformer, vae = _json(folder / "transformer/config.json"), _json(folder / "vae/config.json")
    levels, size, shift = (
        vae.get("block_out_channels"), transformer.get("sample_size"), scheduler.get("shift")
    )  # fmt: skip
    faults = untrusted.number_faults({"sample_size": size}, ["sample_size"], 1, untrusted.MAX_WIDTH)
    if not isinstance(levels, list) or not 0 < len(levels) <= MAX_LEVELS:
        faults.append(f"block_out_channels: {levels!r:.60} is not a list of 1 to {MAX_LEVELS}")
    if not untrusted.is_positive(shift):
        faults.append(f"shift: {shift!r:.60} is not a positive number")
    if faults:
        raise InputError(f"The configs of {folder} are damaged: {'; '.join(faults)}. {_REMEDY}")
    side = size * 2 ** (len(levels) - 1)
    return {"time_shift": float(shift), "height": side, "width": side}


def save_folder(
    path: str | os.PathLike,
    params: Any,
    cfg: NextDiTConfig,
    *,
    dtype: str | None,
    text_encoder: pathlib.Path,
    tokenizer: pathlib.Path,
    vae: pathlib.Path,
    time_shift: float,
    sample_size: int,
) -> None:
    """Writes a pipeline aside, then renames it.

    Args:
      path: To be made.
      params: Of the transformer.
      cfg: Its sizes.
      dtype: Of the transformer on disk; that of `params` by default.
      text_encoder: Folder to copy.
      tokenizer: Likewise; may be the same, where one folder holds both.
      vae: Likewise.
      time_shift: Of the scheduler.
      sample_size: Side of a picture by default, in latents.
    """
    if is_remote(path):
        raise InputError(f"{path} is not on a local disk. Write it to one, then copy the folder.")
    next_dit.check_new(path)
    path = pathlib.Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        settings = {"format": "diffusers", "dtype": dtype, "sample_size": sample_size}
        next_dit.save(aside / "transformer", params, cfg, **settings)
        for name, source in (("text_encoder", text_encoder), ("vae", vae)):
            _copy(source, aside / name, ("config.json", "*.safetensors", f"*{files.INDEX_SUFFIX}"))
        _copy(tokenizer, aside / "tokenizer", _TOKENIZER)
        scheduler = {
            "_class_name": _PARTS["scheduler"][1],
            "_diffusers_version": _DIFFUSERS_VERSION,
            "num_train_timesteps": 1000,
            "shift": time_shift,
            "use_dynamic_shifting": False,
        }
        _write_json(aside / "scheduler" / "scheduler_config.json", scheduler)
        index = {"_class_name": _PIPELINES[0], "_diffusers_version": _DIFFUSERS_VERSION}
        _write_json(aside / "model_index.json", index | _PARTS)
        if path.exists():
            path.rmdir()
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _copy(source: pathlib.Path, target: pathlib.Path, patterns: tuple[str, ...]) -> None:
    target.mkdir(parents=True)
    for pattern in patterns:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)


def _json(path: pathlib.Path) -> dict:
    if not path.exists():
        raise InputError(f"{path} is missing. {_REMEDY}")
    return untrusted.read_json(path, _REMEDY)


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
