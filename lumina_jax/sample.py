"""Draws pictures from prompts.

python -m lumina_jax.sample --checkpoint=runs/tiny --prompt="dog face" --prompt="perro"
python -m lumina_jax.sample --checkpoint=runs/tiny --prompts_file=prompts.jsonl --output=out
python -m lumina_jax.sample --checkpoint=runs/tiny --again=out/0003_perro.png
python -m lumina_jax.sample --checkpoint=runs/tiny --prompt="four cats" --system_prompt=4grid --cut
python -m lumina_jax.sample --checkpoint=models/Lumina-Image-2.0 --prompt="a red fox" --output=out

Writes a PNG for each prompt, with its settings inside, and a contact sheet of all. Stopped at any
moment, the same command goes on. Settings that are not given come from the checkpoint's config.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags, logging
from etils import epath
from jax.experimental import multihost_utils
from PIL import Image

from lumina_jax import (
    checkpoint,
    cli,
    distributed,
    executables,
    files,
    goodput,
    sharding,
    system_prompts,
)
from lumina_jax.data import images
from lumina_jax.errors import InputError
from lumina_jax.progress import progress_bar
from lumina_jax.sampling import panels, pictures
from lumina_jax.sampling.contact_sheet import save_contact_sheet
from lumina_jax.sampling.pipeline import Pipeline
from lumina_jax.sampling.sampler import SEMANTICS, SamplerConfig
from lumina_jax.sampling.solvers import SOLVERS
from lumina_jax.version import __version__

# What a line of a JSONL file of prompts may say.
LINE = {"prompt": str, "negative_prompt": str, "seed": int, "height": int, "width": int}
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
MAX_ON_SHEET = 120


def define_flags() -> None:
    distributed.define_flags()
    flags.DEFINE_string(
        "cache_directory",
        "",
        "Of compiled programs; JAX_COMPILATION_CACHE_DIR, else ~/.cache/lumina_jax.",
    )
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Workdir of a run, or a diffusers pipeline (or its name on the hub).",
    )
    flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Of a diffusers pipeline.")
    flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default.")
    flags.DEFINE_enum("weights", None, checkpoint.WEIGHTS, "Averaged, by default, or raw ones.")
    flags.DEFINE_string("text_encoder_path", None, "Where it lies now, if not where the run did.")
    flags.DEFINE_string("autoencoder_path", None, "Likewise.")
    flags.DEFINE_integer("replica", 1, "Devices that split a batch, each with all weights.")
    flags.DEFINE_integer("data", -1, "Devices that split a batch and the weights; -1: all.")
    flags.DEFINE_integer("model", 1, "Devices that share the work on each picture.")

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


class Request(NamedTuple):
    """A picture to be drawn; all of it is in its metadata."""

    index: int
    prompt: str
    negative_prompt: str
    seed: int
    height: int
    width: int


# Rows of one call of the pipeline: which request is drawn there, None where a row only fills up.
Batch = list[int | None]


def read_prompts(prompts: Sequence[str], path: str | None) -> list[dict[str, Any]]:
    """The prompts of the flags, then the lines of the file, as objects with keys of LINE.

    Blank lines are left out. All faults of a file are told at once.
    """
    lines: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    if path is not None:
        file, faults = epath.Path(path), []
        if file.suffix not in (".txt", ".jsonl"):
            raise InputError(
                f"--prompts_file={path} must end in .txt, with one prompt a line, or in .jsonl, "
                f'with one JSON object a line, such as {{"prompt": "a red fox", "seed": 7}}.'
            )
        if not file.exists():
            raise InputError(f"--prompts_file={path} does not exist. Give a text file.")
        try:
            content = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"--prompts_file={path} is not UTF-8 ({error}). Convert it.") from None
        for number, text in enumerate(content.split("\n"), start=1):
            if text.strip():
                if file.suffix == ".txt":
                    line = {"prompt": text.strip()}
                else:
                    line, found = _parse(text)
                    faults += [f"line {number}: {fault}" for fault in found]
                lines.append(line)
        if faults:
            more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
            raise InputError(f"{path}:\n  " + "\n  ".join(faults[:10]) + more)
    if not lines:
        raise InputError("No prompt was given. Pass --prompt='...' or --prompts_file=FILE.")
    return lines


def _parse(text: str) -> tuple[dict, list[str]]:
    """A line of JSON, and what is wrong with it."""
    try:
        line = json.loads(text)
    except ValueError as error:
        return {}, [f"not JSON: {error}"]
    if not isinstance(line, dict):
        return {}, [f'{text.strip()[:40]} is not an object, such as {{"prompt": "a red fox"}}']
    faults = [] if "prompt" in line else ["no 'prompt'"]
    for key, value in line.items():
        if key not in LINE:
            near = difflib.get_close_matches(key, LINE, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(LINE)}"
            faults.append(f"unknown key {key!r}; {hint}")
        elif type(value) is not LINE[key]:
            needed = "a text" if LINE[key] is str else "a whole number"
            faults.append(f"{key} is {json.dumps(value)}; needed is {needed}")
        elif LINE[key] is str and any("\ud800" <= letter <= "\udfff" for letter in value):
            faults.append(f"{key} holds half a character, such as \\ud83d without its second half")
    return line, faults


def make_requests(
    pipeline: Pipeline,
    lines: Sequence[Mapping[str, Any]],
    *,
    first: int = 0,
    negative_prompt: str | None = None,
    seed: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> list[Request]:
    """A request for each line; what a line does not say comes from the arguments.

    Args:
      pipeline: Knows which sizes can be drawn, and which is the default.
      lines: As `read_prompts` gives them.
      first: Index of the first.
      negative_prompt: Of those that name none.
      seed: Of the first, one more for each after it.
      height: In pixels.
      width: In pixels.
    """
    requests, faults = [], []
    for number, line in enumerate(lines):
        request = Request(
            index=first + number,
            prompt=line["prompt"],
            negative_prompt=line.get("negative_prompt", negative_prompt or ""),
            seed=line.get("seed", (seed or 0) + number),
            height=line.get("height", height or pipeline.size[0]),
            width=line.get("width", width or pipeline.size[1]),
        )
        requests.append(request)
        try:
            pipeline.check_size(request.height, request.width)
            if not 0 <= request.seed < 2**32:
                raise InputError(f"seed {request.seed} is not between 0 and {2**32 - 1}.")
        except InputError as error:
            faults.append(f"Prompt {number + 1}, {request.prompt!r}: {error}")
    if faults:
        raise InputError("\n".join(faults[:10]))
    return requests


def plan(requests: Sequence[Request], slots: Sequence[Hashable], batch_size: int) -> list[Batch]:
    """Batches that each fit one program: of one size of pictures, and equal caption slots.

    All of a group are equally long. What is there already makes no difference: a picture is drawn
    in the same company after a restart, and so gets the same pixels to the last bit.
    """
    groups = defaultdict(list)
    for number, (request, key) in enumerate(zip(requests, slots, strict=True)):
        groups[request.height, request.width, key].append(number)
    batches: list[Batch] = []
    for members in groups.values():
        size = min(batch_size, len(members))
        for start in range(0, len(members), size):
            part = members[start : start + size]
            batches.append(part + [None] * (size - len(part)))
    return batches


def draw(
    pipeline: Callable,
    requests: Sequence[Request],
    batches: Sequence[Batch],
    finished: Sequence[int],
    *,
    write: Callable[[int, Image.Image, tuple[int, int]], None],
    **call,
) -> None:
    """Draws the batches that lack a picture, and writes what is missing as soon as it is drawn.

    Args:
      pipeline: Draws one batch.
      requests: All of them.
      batches: Of numbers of requests, as `plan` makes them.
      finished: Whether there is nothing to write for each request.
      write: write(number of the request, image, (size of the batch, row)).
      **call: Of the pipeline.
    """
    done = sum(finished)
    with progress_bar("Sampling", len(requests), done, unit="pictures") as advance:
        for batch in batches:
            missing = {r: n for r, n in enumerate(batch) if n is not None and not finished[n]}
            if not missing:
                continue
            filler = next(number for number in batch if number is not None)
            rows = [requests[filler if number is None else number] for number in batch]
            drawn = pipeline(
                [request.prompt for request in rows],
                negative_prompt=[request.negative_prompt for request in rows],
                height=rows[0].height,
                width=rows[0].width,
                seed=[request.seed for request in rows],
                **call,
            )
            for row, number in missing.items():
                write(number, drawn[row], (len(batch), row))
            advance(done := done + len(missing))


def check_folder(
    folder: epath.Path, wanted: Mapping[int, Mapping[str, Any]], *, overwrite: bool
) -> list[bool]:
    """Which of the wanted pictures are there; refuses, or removes, those that are not they."""
    found = pictures.survey(folder, wanted)
    if found.differing and not overwrite:
        listed = [f"{path.name}: {fault}" for path, fault in found.differing.items()]
        more = [f"and {len(listed) - 5} more"] if len(listed) > 5 else []
        raise InputError(
            f"{folder} has other pictures than those asked for. Name another folder with --output, "
            f"or draw these anew with --overwrite:\n  " + "\n  ".join(listed[:5] + more)
        )
    for path in found.differing:
        path.unlink()
    if found.finished:
        logging.info("%d of %d picture(s) are there already.", len(found.finished), len(wanted))
    return [index in found.finished for index in wanted]


def told_by_first(find: Callable[[], Sequence[int]], num: int) -> list[int]:
    """What process 0 finds, `num` numbers, on every process; an InputError there stops all."""
    numbers, fault = np.zeros(num + 1, np.int64), None
    if jax.process_index() == 0:
        try:
            numbers[:num] = find()
        except InputError as error:
            numbers[num], fault = 1, error
    *found, failed = multihost_utils.broadcast_one_to_all(numbers).tolist()
    if failed:
        raise fault or InputError("Process 0 cannot go on; its last message says why.")
    return found


def write_panels(folder: epath.Path, names: Sequence[str], system_prompt: str) -> None:
    """Cuts the pictures whose panels are not there yet."""
    there = files.sizes(folder)
    parts = panels.cut(np.zeros((2, 2, 3), np.uint8), system_prompt)
    for name in names:
        if all(pictures.panel_name(name, part) in there for part in parts):
            continue
        metadata = pictures.read_metadata(folder / name)
        cut = panels.cut(pictures.read_pixels(folder / name), system_prompt)
        for part, panel in cut.items():
            path = folder / pictures.panel_name(name, part)
            pictures.write_picture(path, Image.fromarray(panel), {**metadata, "panel": part})


def write_sheet(folder: epath.Path, requests: Sequence[Request], names: Sequence[str]) -> None:
    """A contact sheet of the first MAX_ON_SHEET pictures, from their files."""
    names, prompts = names[:MAX_ON_SHEET], [request.prompt for request in requests[:MAX_ON_SHEET]]
    shown = [pictures.read_pixels(folder / name) for name in names]
    save_contact_sheet(folder / "contact_sheet.png", shown, prompts, columns=6)
    logging.info(
        "%d picture(s) in %s; %s of them on contact_sheet.png.",
        len(requests), folder, "all" if len(names) == len(requests) else f"the first {len(names)}",
    )  # fmt: skip


def draw_into(
    folder: epath.PathLike,
    pipeline: Callable,
    requests: Sequence[Request],
    batches: Sequence[Batch],
    *,
    metadata: Mapping[str, Any],
    overwrite: bool,
    cut: bool,
    **call,
) -> float | None:
    """Draws what is not in the folder yet; then panels, and a contact sheet.

    Args:
      folder: Process 0 alone writes to it.
      pipeline: Draws one batch.
      requests: All of them.
      batches: Of numbers of requests.
      metadata: What is written into every picture, besides its request.
      overwrite: Whether pictures that are others than those asked for are removed, or refused.
      cut: Whether to write panels.
      **call: Of the pipeline.

    Returns:
      When the first picture was written, in seconds since 1970; None if all were there.
    """
    folder, is_first, drawn_at = epath.Path(folder), jax.process_index() == 0, []
    wanted = {request.index: {**request._asdict(), **metadata} for request in requests}
    names = [pictures.file_name(request.index, request.prompt) for request in requests]

    def write(number, image, batch):
        if is_first:
            content = {**wanted[requests[number].index], "batch": batch}
            pictures.write_picture(folder / names[number], image, content)
        drawn_at.append(time.time())

    with contextlib.ExitStack() as stack:

        def look():
            stack.enter_context(pictures.sole_writer(folder))
            return check_folder(folder, wanted, overwrite=overwrite)

        finished = told_by_first(look, len(requests))
        draw(pipeline, requests, batches, finished, write=write, **call)
        if is_first and cut:
            write_panels(folder, names, metadata["system_prompt"])
        if is_first:
            write_sheet(folder, requests, names)
    return drawn_at[0] if drawn_at else None


def checkpoint_name(args: flags.FlagValues) -> str:
    return epath.Path(args.checkpoint).absolute().name


def open_pipeline(args: flags.FlagValues) -> tuple[Pipeline, dict[str, Any]]:
    """The pipeline on its mesh, and what metadata say of its checkpoint."""
    try:
        mesh = sharding.make_mesh(replica=args.replica, data=args.data, model=args.model)
    except InputError as error:
        raise InputError(str(error).replace("--config.mesh.", "--")) from None
    logging.info("Mesh: %s", ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items()))
    name = checkpoint_name(args)
    if not checkpoint.is_run(args.checkpoint):
        dtype = args.dtype or "bfloat16"
        pipeline = Pipeline.from_diffusers(args.checkpoint, dtype=dtype, mesh=mesh)
        return pipeline, {"name": name, "dtype": dtype}
    # Of a run that goes on, the newest may be another one a moment later.
    (step,) = told_by_first(lambda: [int(checkpoint.find(args.checkpoint, args.step).name)], 1)
    weights = args.weights or "ema"
    pipeline = Pipeline.from_checkpoint(
        args.checkpoint,
        step=step,
        weights=weights,
        text_encoder_path=args.text_encoder_path,
        autoencoder_path=args.autoencoder_path,
        mesh=mesh,
    )
    return pipeline, {"name": name, "step": step, "weights": weights}


def output_folder(args: flags.FlagValues) -> epath.Path:
    if args.output is not None:
        return epath.Path(args.output)
    if not checkpoint.is_run(args.checkpoint):
        raise InputError(
            f"--checkpoint={args.checkpoint} is not the workdir of a run. If it is a diffusers "
            f"pipeline, name a folder for the pictures: --output."
        )
    return epath.Path(args.checkpoint) / ("again" if args.again else "samples")


def folder_name(requests: Sequence[Request], metadata: Mapping[str, Any]) -> str:
    """Of the pictures of a command: the same command finds them again, another has its own."""
    content = json.dumps([requests, metadata], sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    return f"{pictures.letters(requests[0].prompt)}_{digest}".lstrip("_")


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
    pipeline, weights = open_pipeline(args)
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
    metadata = {
        "system_prompt": system_prompt,
        "sampling": dataclasses.asdict(config),
        **digests,
        **({} if args.strength is None else {"strength": args.strength}),
        "checkpoint": weights,
        "fingerprint": pipeline.fingerprint(),
        "version": __version__,
    }
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
