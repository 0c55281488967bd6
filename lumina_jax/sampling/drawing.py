"""Draws requests into a folder: stopped at any moment, the same call goes on."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from lumina_jax import distributed, files
from lumina_jax.errors import InputError
from lumina_jax.progress import progress_bar
from lumina_jax.sampling import panels, pictures
from lumina_jax.sampling.contact_sheet import save_contact_sheet
from lumina_jax.sampling.requests import Batch, Request

MAX_ON_SHEET = 120


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

        finished = distributed.told_by_first(look, len(requests))
        draw(pipeline, requests, batches, finished, write=write, **call)
        if is_first and cut:
            write_panels(folder, names, metadata["system_prompt"])
        if is_first:
            write_sheet(folder, requests, names)
    return drawn_at[0] if drawn_at else None


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


def folder_name(requests: Sequence[Request], metadata: Mapping[str, Any]) -> str:
    """Of the pictures of a command: the same command finds them again, another has its own."""
    content = json.dumps([requests, metadata], sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    return f"{pictures.letters(requests[0].prompt)}_{digest}".lstrip("_")
