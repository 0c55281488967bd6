"""Draws pictures from prompts.

python -m lumina_jax.sample --checkpoint=runs/tiny --prompt="dog face" --prompt="perro"
python -m lumina_jax.sample --checkpoint=runs/tiny --prompts_file=prompts.jsonl --output=out
python -m lumina_jax.sample --checkpoint=runs/tiny --again=out/0003_perro.png
python -m lumina_jax.sample --checkpoint=runs/tiny --prompt="four cats" --system_prompt=4grid --cut
python -m lumina_jax.sample --checkpoint=models/Lumina-Image-2.0 --prompt="a red fox" --output=out

Writes a PNG for each prompt, with its settings inside, and a contact sheet of all. Stopped at any
moment, the same command goes on. Settings that are not given come from the checkpoint's config.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags, logging
from etils import epath
from PIL import Image

from lumina_jax import (
    checkpoint,
    cli,
    distributed,
    executables,
    goodput,
    sharding,
    system_prompts,
)
from lumina_jax.data import images
from lumina_jax.errors import InputError
from lumina_jax.sampling import panels, pictures
from lumina_jax.sampling.drawing import draw_into, folder_name
from lumina_jax.sampling.pipeline import Pipeline
from lumina_jax.sampling.requests import Request, make_requests, plan, read_prompts
from lumina_jax.sampling.sampler import SEMANTICS, SamplerConfig
from lumina_jax.sampling.solvers import SOLVERS

# Sampling settings and their types; each is a flag.
SETTINGS = {field.name: field.type for field in dataclasses.fields(SamplerConfig)}
LISTS = tuple(name for name, kind in SETTINGS.items() if kind not in (int, float, bool, str))
HELP = {
    "num_steps": "Points of the time grid, or intervals.",
    "guidance_scale": "1 follows the prompt alone.",
    "guidance_truncation": "1 guides to the end.",
    "guidance_renorm": "0 is off.",
    "semantics": f"Whose meaning those four have: {', '.join(SEMANTICS)}.",
    "solver": f"{', '.join(SOLVERS)}.",
    "time_shift": "1 spends the steps evenly; 0 goes by the size.",
    "cache_threshold": "Reuse the layers' work until it changed by this fraction; 0 is off.",
    "cache_interval": "Run the layers in every n-th evaluation only; 1 is off.",
    "cache_coefficients": "Of the polynomial from a distance to a change, with commas.",
    "cache_order": "1 follows the line through the last two results; 0 takes the last one.",
    "merge_ratio": "Of the image tokens, how many go with a similar one; 0 is off.",
    "merge_layers": "From,to: fractions of the layers.",
    "merge_steps": "From,to: fractions of the evaluations.",
    "rope_scaling": "none, or time_aware for pictures larger than those of training.",
    "rope_watershed": "From when on only slow rotations are stretched.",
    "proportional_attention": "Sharper attention in pictures larger than those of training.",
}
# Flags that take their value from a picture to be drawn again.
TAKEN_OVER = (
    "step", "weights", "dtype", "prompt", "negative_prompt", "seed", "height", "width",
    "system_prompt", "strength", *SETTINGS,
)  # fmt: skip


def define_model_flags() -> None:
    """Flags that say which model is opened, and on which devices: `open_pipeline` reads them."""
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Workdir of a run, or a diffusers pipeline (or its name on the hub).",
    )
    flags.DEFINE_integer("step", None, "Which checkpoint of a run; the newest by default.")
    flags.DEFINE_enum("weights", None, checkpoint.WEIGHTS, "Averaged, by default, or raw ones.")
    flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Of a diffusers pipeline.")
    flags.DEFINE_string("text_encoder_path", None, "Where it lies now, if not where the run did.")
    flags.DEFINE_string("autoencoder_path", None, "Likewise.")
    flags.DEFINE_string(
        "cache_calibration",
        None,
        "Of tools/calibrate_cache.py, its file or folder; a run's is in its workdir.",
    )
    flags.DEFINE_integer("replica", 1, "Devices that split a batch, each with all weights.")
    flags.DEFINE_integer("data", -1, "Devices that split a batch and the weights; -1: all.")
    flags.DEFINE_integer("model", 1, "Devices that share the work on each picture.")
    flags.DEFINE_string(
        "cache_directory",
        "",
        "Of compiled programs; JAX_COMPILATION_CACHE_DIR, else ~/.cache/lumina_jax.",
    )


def define_flags() -> None:
    distributed.define_flags()
    define_model_flags()
    flags.DEFINE_multi_string("prompt", [], "A prompt; may be given many times.")
    flags.DEFINE_string("prompts_file", None, ".txt, a prompt a line; .jsonl, an object a line.")
    flags.DEFINE_string("again", None, "Draw this PNG again: all it says, but for other flags.")
    flags.DEFINE_string("output", None, "Folder; one in <checkpoint>/samples by default.")
    flags.DEFINE_bool("overwrite", False, "Draw anew what is there and differs.")
    flags.DEFINE_integer("batch_size", None, "Pictures drawn at a time, 16.", lower_bound=1)
    flags.DEFINE_integer("seed", None, "Of the first prompt, 0; one more for each after it.")
    flags.DEFINE_integer("height", None, "In pixels.")
    flags.DEFINE_integer("width", None, "In pixels.")
    flags.DEFINE_string("negative_prompt", None, "What to lead away from.")
    flags.DEFINE_string("system_prompt", None, "Its name, such as real, 4grid or empty.")
    flags.DEFINE_string("condition", None, "A second panel for this, such as 'depth map'.")
    flags.DEFINE_enum("half", None, panels.HALVES, "Where that panel is: the lower half.")
    flags.DEFINE_bool("cut", False, "Write the panels as pictures of their own too.")
    flags.DEFINE_string("image", None, "A picture to begin from, of the size to be drawn.")
    flags.DEFINE_float("strength", None, "How much of the path is walked anew from there.")
    flags.DEFINE_string("mask", None, "White where that picture may change; as large.")

    for name, kind in SETTINGS.items():
        define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool,
                  str: flags.DEFINE_string}.get(kind, flags.DEFINE_list)  # fmt: skip
        define(name, None, HELP.get(name, "See SamplerConfig."))


def take_over(args: flags.FlagValues, metadata: Mapping[str, Any]) -> None:
    """Gives flags that were not given the values with which a picture was drawn."""
    if args.prompts_file or len(args.prompt) > 1:
        raise InputError(
            "--again draws one picture: leave out --prompts_file and further --prompt."
        )
    told = {**metadata, **metadata["sampling"], "prompt": [metadata["prompt"]]}
    told["system_prompt"] = metadata["system_prompt"] or "empty"
    if args.condition is not None:
        del told["system_prompt"]
    if metadata["checkpoint"]["name"] == checkpoint_name(args):
        told |= metadata["checkpoint"]
    for name in TAKEN_OVER:
        if args[name].value in (None, []) and name in told:
            args[name].value = told[name]


def checkpoint_name(args: flags.FlagValues) -> str:
    return epath.Path(args.checkpoint).absolute().name


def open_pipeline(args: flags.FlagValues) -> tuple[Pipeline, dict[str, Any]]:
    """The pipeline on its mesh, and what metadata say of its checkpoint."""
    try:
        mesh = sharding.make_mesh(replica=args.replica, data=args.data, model=args.model)
    except InputError as error:
        raise InputError(str(error).replace("--config.mesh.", "--")) from None
    logging.info("Mesh: %s", ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items()))
    step, about = args.step, {"name": checkpoint_name(args)}
    if checkpoint.is_run(args.checkpoint):
        # Of a run that goes on, the newest may be another one a moment later.
        (step,) = distributed.told_by_first(
            lambda: [int(checkpoint.find(args.checkpoint, step).name)], 1
        )
        about |= {"step": step, "weights": args.weights or "ema"}
    else:
        about["dtype"] = args.dtype or "bfloat16"
    pipeline = Pipeline.open(
        args.checkpoint,
        step=step,
        weights=args.weights,
        dtype=args.dtype,
        text_encoder_path=args.text_encoder_path,
        autoencoder_path=args.autoencoder_path,
        mesh=mesh,
    )
    if args.cache_calibration is not None:
        pipeline.use_calibration(args.cache_calibration)
    return pipeline, about


def output_folder(args: flags.FlagValues) -> epath.Path:
    if args.output is not None:
        return epath.Path(args.output)
    if not checkpoint.is_run(args.checkpoint):
        raise InputError(
            f"--checkpoint={args.checkpoint} is not the workdir of a run. If it is a diffusers "
            f"pipeline, name a folder for the pictures: --output."
        )
    return epath.Path(args.checkpoint) / ("again" if args.again else "samples")


def read_start(
    paths: Mapping[str, str | None], again: Mapping[str, Any]
) -> tuple[dict[str, Image.Image], dict[str, str]]:
    """The files to begin from and their digests, by name: "image", "mask".

    Args:
      paths: Of those that are given.
      again: Metadata of a picture to be drawn again, which needs what it was drawn from.
    """
    found, digests = {}, {}
    for name, path in paths.items():
        if path is None:
            if name in again:
                raise InputError(
                    f"The picture to draw again was drawn from a file that is not in it: give the "
                    f"one with sha256 {again[name]} as --{name}."
                )
            continue
        try:
            content = epath.Path(path).read_bytes()
            found[name] = images.decode(content)
        except FileNotFoundError:
            raise InputError(f"--{name}={path} does not exist.") from None
        except images.Rejected as error:
            raise InputError(f"--{name}={path} cannot be read: {error}.") from None
        digests[name] = hashlib.sha256(content).hexdigest()
    return found, digests


def read_numbers(name: str, texts: Sequence[Any] | None) -> list[float] | None:
    """The value of a flag that is several numbers."""
    try:
        return None if texts is None else [float(text) for text in texts]
    except ValueError:
        raise InputError(
            f"--{name}={','.join(texts)} must be numbers with commas between, such as 0.1,0.9."
        ) from None


def read_system_prompt(name: str | None, condition: str | None, half: str | None) -> str | None:
    """The text that the flags ask for; None where the checkpoint's is meant."""
    if condition is not None and name is not None:
        raise InputError("--condition makes a system prompt of its own: leave out --system_prompt.")
    if condition is not None:
        return system_prompts.dual_panel(condition, half or "lower half")
    if half is not None:
        raise InputError(f"--half={half!r} is the place of --condition, which is missing.")
    return None if name is None else system_prompts.prefixed("", name)


def check_sizes(
    requests: Sequence[Request], start: Mapping[str, Image.Image], panels_of: str | None
) -> None:
    """Refuses sizes that do not fit the files to begin from, or cannot be cut into panels."""
    for request in requests:
        for name, picture in start.items():
            if picture.size != (request.width, request.height):
                raise InputError(
                    f"--{name} has {picture.height} x {picture.width} pixels (height x width), and "
                    f"{request.prompt!r} is to be drawn with {request.height} x {request.width}. "
                    f"Resize the file, or pass --height={picture.height} --width={picture.width}."
                )
    if panels_of is not None:
        for height, width in {(request.height, request.width) for request in requests}:
            panels.cut(np.empty((height, width, 3), np.uint8), panels_of)


def cache_directory() -> str:
    """Where programs are kept if nothing else is said: in a folder of the user's own."""
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return str(folder / "lumina_jax")


def main() -> None:
    args, began = flags.FLAGS, goodput.process_start()
    again = pictures.read_metadata(args.again) if args.again else None
    if again:
        take_over(args, again)
    lines = read_prompts(args.prompt, args.prompts_file)
    system_prompt = read_system_prompt(args.system_prompt, args.condition, args.half)
    settings = {name: args[name].value for name in SETTINGS}
    settings |= {name: read_numbers(name, args[name].value) for name in LISTS}
    start, digests = read_start({"image": args.image, "mask": args.mask}, again or {})
    folder = output_folder(args)

    distributed.from_flags()
    executables.use_cache(args.cache_directory, default=cache_directory())
    pipeline, about = open_pipeline(args)
    config = pipeline.settings(**settings)
    if system_prompt is None:
        system_prompt = system_prompts.prefixed("", pipeline.system_prompt)
    requests = make_requests(
        pipeline,
        lines,
        first=again["index"] if again else 0,
        negative_prompt=args.negative_prompt,
        seed=args.seed,
        height=args.height,
        width=args.width,
    )
    check_sizes(requests, start, system_prompt if args.cut else None)
    metadata = pictures.shared_metadata(
        config,
        system_prompt=system_prompt,
        start=digests,
        strength=args.strength,
        checkpoint=about,
        fingerprint=pipeline.fingerprint(),
    )
    if args.output is None and not again:
        folder /= folder_name(requests, metadata)
    prefix = system_prompt or "empty"
    if again and args.batch_size is None:  # in its old row, so that even roundings are the same
        size, old_row = again["batch"]
        batches = [[0 if row == old_row else None for row in range(size)]]
    else:
        slots = pipeline.caption_slots(
            [request.prompt for request in requests],
            [request.negative_prompt for request in requests],
            prefix,
            config.semantics,
        )
        batches = plan(requests, slots, args.batch_size or 16)
    if again and again["fingerprint"] != metadata["fingerprint"]:
        logging.warning("%s was drawn by other weights: the pixels will differ.", args.again)

    first = draw_into(
        folder,
        pipeline,
        requests,
        batches,
        metadata=metadata,
        overwrite=args.overwrite,
        cut=args.cut,
        system_prompt=prefix,
        strength=args.strength,
        **start,
        **metadata["sampling"],
    )
    if first is not None:
        logging.info("The first picture was there %.1f s after the start.", first - began)
    logging.info("%s", executables.summary())


if __name__ == "__main__":
    define_flags()
    cli.run(main, required=("checkpoint",))
