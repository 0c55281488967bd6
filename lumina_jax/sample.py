"""Draws pictures from prompts.

python -m lumina_jax.sample --checkpoint=runs/tiny --prompt="dog face" --prompt="perro"
python -m lumina_jax.sample --checkpoint=runs/tiny --prompts_file=prompts.txt --output=out --seed=7
python -m lumina_jax.sample --checkpoint=models/Lumina-Image-2.0 --prompt="a red fox" --output=out

Writes a PNG for each prompt and a contact sheet of all. Settings that are not given come from the
checkpoint's config.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags, logging
from etils import epath
from PIL import Image

from lumina_jax import checkpoint, cli, executables, files
from lumina_jax.errors import InputError
from lumina_jax.progress import progress_bar
from lumina_jax.sampling.contact_sheet import save_contact_sheet
from lumina_jax.sampling.pipeline import Pipeline


def define_flags() -> None:
    flags.DEFINE_string("cache_directory", "", "Of compiled programs; JAX_COMPILATION_CACHE_DIR.")
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Workdir of a run, or a diffusers pipeline (or its name on the hub).",
    )
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of a diffusers pipeline.")
    flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default.")
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Averaged or raw weights.")
    flags.DEFINE_string("text_encoder_path", None, "Where it lies now, if not where the run did.")
    flags.DEFINE_string("autoencoder_path", None, "Likewise.")
    flags.DEFINE_multi_string("prompt", [], "A prompt; may be given many times.")
    flags.DEFINE_string("prompts_file", None, "A text file, one prompt a line.")
    flags.DEFINE_string("negative_prompt", None, "What to lead away from.")
    flags.DEFINE_string("system_prompt", None, "Its name, such as real or empty.")
    flags.DEFINE_string("output", None, "Folder; <checkpoint>/samples by default.")
    flags.DEFINE_integer("batch_size", 16, "Pictures drawn at a time.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the first prompt; one more for each after it.")
    flags.DEFINE_integer("height", None, "In pixels.")
    flags.DEFINE_integer("width", None, "In pixels.")
    flags.DEFINE_integer("num_steps", None, "Points of the time grid, or intervals.")
    flags.DEFINE_float("guidance_scale", None, "1 follows the prompt alone.")
    flags.DEFINE_float("guidance_truncation", None, "1 guides to the end.")
    flags.DEFINE_float("guidance_renorm", None, "0 is off.")
    flags.DEFINE_string("semantics", None, "official or diffusers.")
    flags.DEFINE_string("solver", None, "euler or midpoint.")
    flags.DEFINE_float("time_shift", None, "1 spends the steps evenly.")


# Flags that are arguments of the pipeline's call; None leaves the checkpoint's setting.
SETTINGS = (
    "negative_prompt",
    "system_prompt",
    "height",
    "width",
    "num_steps",
    "guidance_scale",
    "guidance_truncation",
    "guidance_renorm",
    "semantics",
    "solver",
    "time_shift",
)


def read_prompts(prompts: Sequence[str], path: str | None) -> list[str]:
    """The prompts of the flags, then those of the file; blank lines are left out."""
    prompts = list(prompts)
    if path is not None:
        file = epath.Path(path)
        if not file.exists():
            raise InputError(f"--prompts_file={path} does not exist. Give a text file.")
        prompts += [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not prompts:
        raise InputError("No prompt was given. Pass --prompt='...' or --prompts_file=FILE.")
    return prompts


def file_name(index: int, prompt: str) -> str:
    """A name that sorts by index and tells the prompt: letters of any script, no more than 40."""
    letters = re.sub(r"\W+", "_", prompt).strip("_")
    return f"{index:04d}_{letters[:40]}.png"


def draw(
    pipeline: Callable, prompts: Sequence[str], *, batch_size: int, seed: int, **settings
) -> list[Image.Image]:
    """One picture for each prompt, `batch_size` at a time through one compiled program."""
    images = []
    with progress_bar("Sampling", len(prompts), unit="pictures") as advance:
        for start in range(0, len(prompts), batch_size):
            part = list(prompts[start : start + batch_size])
            # The last batch is filled up, so that it runs the program of the others.
            full = part if start == 0 else part + part[-1:] * (batch_size - len(part))
            images += pipeline(full, seed=seed + start, **settings)[: len(part)]
            advance(len(images))
    return images


def main() -> None:
    args = flags.FLAGS
    executables.use_cache(args.cache_directory)
    prompts = read_prompts(args.prompt, args.prompts_file)
    if checkpoint.is_run(args.checkpoint):
        pipeline = Pipeline.from_checkpoint(
            args.checkpoint,
            step=args.step,
            weights=args.weights,
            text_encoder_path=args.text_encoder_path,
            autoencoder_path=args.autoencoder_path,
        )
    elif args.output is None:
        raise InputError(
            f"--checkpoint={args.checkpoint} is not the workdir of a run. If it is a diffusers "
            f"pipeline, name a folder for the pictures: --output."
        )
    else:
        pipeline = Pipeline.from_diffusers(args.checkpoint, dtype=args.dtype)
    settings = {name: args[name].value for name in SETTINGS}
    images = draw(pipeline, prompts, batch_size=args.batch_size, seed=args.seed, **settings)
    folder = epath.Path(args.output or epath.Path(args.checkpoint) / "samples")
    for index, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        files.write_png(folder / file_name(index, prompt), image)
    sheet = folder / "contact_sheet.png"
    save_contact_sheet(sheet, [np.asarray(image) for image in images], prompts, columns=6)
    logging.info("%d pictures in %s; all of them on %s", len(images), folder, sheet)
    logging.info("%s", executables.summary())


if __name__ == "__main__":
    define_flags()
    cli.run(main, required=("checkpoint",))
