"""Turns weights of the Lumina-Image 2.0 transformer into another format.

    python tools/convert_checkpoint.py --input=consolidated.00-of-01.pth --format=diffusers \
        --output=lumina2/transformer
    python tools/convert_checkpoint.py --input=runs/stage3 --format=comfyui --dtype=bfloat16 \
        --output=lumina2.safetensors
    python tools/convert_checkpoint.py --input=Alpha-VLLM/Lumina-Image-2.0 --format=lumina_jax \
        --output=gs://bucket/released

Input: the workdir of a run, a diffusers pipeline or its transformer folder (also by its name on the
Hugging Face hub), an official or ComfyUI file (.safetensors or .pth). What it is, is found out.
Output: for diffusers a folder, for official and comfyui a .safetensors or .pth file, for lumina_jax
a workdir, which `train.init_from` and `lumina_jax.sample` take. `Pipeline.save_diffusers` writes a
whole diffusers pipeline, text encoder and VAE included.
"""

import time

import jax
from absl import flags

from lumina_jax import checkpoint, cli, sharding
from lumina_jax.errors import InputError
from lumina_jax.models.next_dit import NextDiTConfig, abstract_params
from lumina_jax.sampling.pipeline import released_sections, typed
from lumina_jax.weights import next_dit

FORMATS = (*next_dit.FORMATS, "lumina_jax")

_INPUT = flags.DEFINE_string("input", None, "What to convert.")
_OUTPUT = flags.DEFINE_string("output", None, "What to write.")
_FORMAT = flags.DEFINE_enum("format", None, FORMATS, "Of the output.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of the output; that of the input by default."
)
_WEIGHTS = flags.DEFINE_enum(
    "weights", "ema", ["ema", "params"], "Which of a run: averaged or raw weights."
)
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint of a run; the newest by default.")
_AXES_DIMS = flags.DEFINE_list(
    "axes_dims", None, "Three even numbers, for files that do not say how a head is shared."
)
_PATCH_SIZE = flags.DEFINE_integer(
    "patch_size", None, "For files that do not say it; 2 by default."
)
_PIPELINE = flags.DEFINE_string(
    "pipeline",
    "Alpha-VLLM/Lumina-Image-2.0",
    "Diffusers pipeline, a folder or a name on the hub, whose text encoder and VAE a lumina_jax "
    "checkpoint names.",
)


def read(mesh: jax.sharding.Mesh) -> tuple[NextDiTConfig, dict, dict]:
    """The model at --input, its parameters, and what a config says besides."""
    if checkpoint.is_run(_INPUT.value):
        found = checkpoint.find(_INPUT.value, _STEP.value)
        meta = checkpoint.load_meta(found)
        cfg = NextDiTConfig(**meta["model"])
        dtype = _DTYPE.value or checkpoint.dtype_of(found, _WEIGHTS.value)
        abstract = typed(abstract_params(cfg), dtype)
        shardings = sharding.tree_shardings(abstract, mesh)
        params = checkpoint.load_params(found, abstract, shardings, weights=_WEIGHTS.value)
        return cfg, params, meta["config"]
    known = {"patch_size": _PATCH_SIZE.value, "axes_dims": _axes_dims()}
    known = {name: value for name, value in known.items() if value is not None}
    with next_dit.open_transformer(_INPUT.value, **known) as source:
        abstract = typed(abstract_params(source.cfg), _DTYPE.value or source.dtype)
        params = source.load(abstract, sharding.tree_shardings(abstract, mesh))
        return source.cfg, params, released_sections(_PIPELINE.value)


def main() -> None:
    began = time.perf_counter()
    if _FORMAT.value in ("diffusers", "lumina_jax"):  # known now, not after ten gigabytes
        next_dit.check_new(_OUTPUT.value)
    # No accelerator is needed, and a host has more memory than one.
    mesh = sharding.make_mesh(replica=1, data=1, model=1, devices=jax.devices("cpu")[:1])
    cfg, params, config = read(mesh)
    if _FORMAT.value == "lumina_jax":
        checkpoint.save_weights(_OUTPUT.value, params, checkpoint.weights_meta(cfg, config))
    else:
        next_dit.save(_OUTPUT.value, params, cfg, format=_FORMAT.value)
    seconds = time.perf_counter() - began
    print(f"{_OUTPUT.value} ({_FORMAT.value}) written in {seconds:.0f} s.")


def _axes_dims():
    if _AXES_DIMS.value is None:
        return None
    try:
        return tuple(int(dim) for dim in _AXES_DIMS.value)
    except ValueError:
        raise InputError(f"--axes_dims={','.join(_AXES_DIMS.value)} are not numbers.") from None


if __name__ == "__main__":
    cli.run(main, required=("input", "output", "format"))
