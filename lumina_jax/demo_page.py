"""What the page of `tools/demo.py` offers, without the page: orders, a line, words.

A form is read into an Order, which is checked there. A Studio draws one order after another in a
thread of its own; the page looks at the Drawing now and then, and tells in HTML how far it is. The
command of an order draws the same pictures without a page.
"""

import base64
import contextlib
import dataclasses
import hashlib
import html
import io
import math
import pathlib
import secrets
import shlex
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lumina_jax import system_prompts
from lumina_jax.data import images
from lumina_jax.data.buckets import Bucket, bucket_sizes, choose_bucket, resize_and_crop
from lumina_jax.errors import InputError
from lumina_jax.sampling import pictures
from lumina_jax.sampling.pipeline import Pipeline
from lumina_jax.sampling.sampler import SamplerConfig

MAX_PICTURES = 8  # of a drawing: fewer than lumina_jax.sample draws in one batch
MAX_WAITING = 20
# What the page's own fields keep to, and a program that sends a form need not.
MAX_TEXT = 10_000  # letters of a prompt; the text encoders read a few hundred words
MAX_STEPS = 1000
MAX_SIDE = 8192  # pixels
# Random ones are short enough to be read aloud.
NUM_RANDOM_SEEDS = 1_000_000
# Width to height of the sizes that are offered.
RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16), (5, 2), (2, 5))


class Order(NamedTuple):
    """What a visitor asks for, checked.

    Attributes:
      prompt: Of all its pictures.
      negative_prompt: Likewise.
      system_prompt: Its name.
      num_pictures: Drawn together.
      seed: Of the first picture, one more for each after it.
      height: In pixels.
      width: In pixels.
      settings: Fields of SamplerConfig that differ from the checkpoint's.
      image: To begin from, of this size; None begins from noise.
      mask: White where that picture may change; None lets all of it change.
      strength: How much of the path is walked anew from there.
      preview: Whether the page shows how it grows.
    """

    prompt: str
    negative_prompt: str
    system_prompt: str
    num_pictures: int
    seed: int
    height: int
    width: int
    settings: dict[str, Any]
    image: Image.Image | None
    mask: Image.Image | None
    strength: float | None
    preview: bool


def read(form: Mapping[str, Any], pipeline: Pipeline) -> Order:
    """The order that a form asks for; an InputError says what cannot be.

    Args:
      form: Values of the page's fields, by name. An empty field is None.
      pipeline: That is to draw it.
    """
    for name in ("num_pictures", "width", "height", "seed", "strength"):
        if form[name] is None:
            raise InputError(f"The field {name.replace('_', ' ')} is empty: give a number.")
    num, height, width = (int(form[name]) for name in ("num_pictures", "height", "width"))
    if fault := _excess(form, num, height, width):
        raise InputError(f"{fault}.")
    pipeline.check_size(height, width)
    last = 2**32 - num
    seed = secrets.randbelow(NUM_RANDOM_SEEDS) if form["random"] else int(form["seed"])
    if not 0 <= seed <= last:
        raise InputError(f"The seed {seed} of {num} picture(s) is not between 0 and {last}.")
    given = {
        field.name: field.type(form[field.name])
        for field in dataclasses.fields(SamplerConfig)
        if form.get(field.name) is not None
    }
    config = pipeline.settings(**given)
    image, mask = read_start(form["start"], height, width)
    strength = None if image is None else float(form["strength"])
    pipeline.path(height, width, config, 1.0 if strength is None else strength)
    return Order(
        prompt=form["prompt"] or "",
        negative_prompt=form["negative_prompt"] or "",
        system_prompt=form["system_prompt"],
        num_pictures=num,
        seed=seed,
        height=height,
        width=width,
        settings={k: v for k, v in given.items() if v != getattr(pipeline.defaults, k)},
        image=image,
        mask=mask,
        strength=strength,
        preview=form["preview"],
    )


def _excess(form, num, height, width):
    """What of a form is more than the page draws; None if nothing is."""
    for name in ("prompt", "negative_prompt", "system_prompt"):
        if len(form[name] or "") > MAX_TEXT:
            return f"The {name.replace('_', ' ')} has more than {MAX_TEXT:,} letters"
    for name, number, most in (
        ("number of pictures", num, MAX_PICTURES),
        ("height", height, MAX_SIDE),
        ("width", width, MAX_SIDE),
        ("number of steps", form.get("num_steps") or 1, MAX_STEPS),
    ):
        if not 1 <= number <= most:
            return f"The {name} is {number}; the page draws 1 to {most:,}"
    return None


def read_start(
    editor: Mapping[str, Any] | None, height: int, width: int
) -> tuple[Image.Image | None, Image.Image | None]:
    """Picture and mask, fitted to the size to be drawn; None where there is none.

    Args:
      editor: A picture as `background`, and what was painted over it as transparent `layers`.
      height: In pixels.
      width: In pixels.
    """
    picture = editor and editor["background"]
    painted = [layer.getchannel("A") for layer in editor["layers"]] if editor else []
    painted = [layer for layer in painted if layer.getbbox() is not None]
    if not picture:
        if painted:
            raise InputError("Something is painted, and there is no picture under it: load one.")
        return None, None
    image = fit(picture, height, width)
    if not painted:
        return image, None
    mask = Image.new("L", picture.size)
    for layer in painted:
        mask.paste(255, mask=layer.resize(picture.size).point(lambda alpha: 255 * (alpha > 0)))
    fitted = fit(mask, height, width).convert("L")
    return image, fitted.point(lambda grey: 255 * (grey >= 128))


def fit(picture: Image.Image, height: int, width: int) -> Image.Image:
    """The centre of a picture at exactly this size, as data are fitted into a bucket."""
    return resize_and_crop(images.to_rgb(picture), Bucket(width, height))


def command(order: Order, pipeline: Pipeline, given: Mapping[str, Any]) -> str:
    """The command that draws the same pictures: it names what differs from the checkpoint's.

    Args:
      order: What to draw.
      pipeline: Whose defaults need not be named.
      given: Flags that open it, "checkpoint" first.
    """
    usual = {
        "negative_prompt": "",
        "system_prompt": pipeline.system_prompt,
        "height": pipeline.size[0],
        "width": pipeline.size[1],
    }
    told = [*given.items(), *[("prompt", order.prompt)] * order.num_pictures, ("seed", order.seed)]
    told += [(k, getattr(order, k)) for k in usual if getattr(order, k) != usual[k]]
    told += order.settings.items()
    if order.image is not None:
        told += [("image", "image.png"), ("strength", order.strength)]
    if order.mask is not None:
        told.append(("mask", "mask.png"))
    words = [f"--{name}={shlex.quote(str(value))}" for name, value in told]
    # A folder of its own: lumina_jax.sample refuses one that holds other pictures.
    digest = hashlib.sha256(" ".join(words).encode()).hexdigest()
    return " ".join(["python -m lumina_jax.sample", *words, f"--output=out/{digest[:8]}"])


class Frame(NamedTuple):
    """What a drawing looks like after some of its evaluations.

    Attributes:
      done: Evaluations.
      total: Likewise.
      images: uint8 [B, H, W, 3], small.
      left: Seconds to the last evaluation; None while there is nothing to tell it from.
    """

    done: int
    total: int
    images: np.ndarray
    left: float | None


class Drawn(NamedTuple):
    """A finished order.

    Attributes:
      files: A PNG for each picture, with its settings inside.
      captions: Of each.
      start: The files that the command begins from.
      stage: The pictures as HTML.
      seconds: That it took.
    """

    files: list[str]
    captions: list[str]
    start: list[str]
    stage: str
    seconds: float


class Stopped(Exception):
    """A visitor does not want to see the end."""


class Drawing:
    """An order on its way. A thread draws it; the page looks at it now and then.

    Attributes:
      order: That it draws.
      began: When the thread turned to it.
      is_first: Whether it is the first of its kind, which is compiled.
      usual_seconds: What one of this kind took last time; None where that is not known.
      frame: The newest preview.
      stopped: Whether it is to end at its next evaluation.
      future: Its end.
    """

    def __init__(self, order: Order):
        self.order = order
        self.began: float | None = None
        self.is_first = True
        self.usual_seconds: float | None = None
        self.frame: Frame | None = None
        self.stopped = False
        self.future: Future[Drawn] = Future()
        self._first = 0.0

    def watch(self, done: int, total: int, shown: np.ndarray) -> None:
        """Called by the pipeline in every evaluation; the only place where it can be stopped."""
        if self.stopped:
            raise Stopped
        now = time.monotonic()
        if self.frame is None:  # before it the compiler was at work
            self._first = now
        left = (now - self._first) / (done - 1) * (total - done) if done > 1 else None
        self.frame = Frame(done, total, shown, left)

    @property
    def can_stop(self) -> bool:
        return not self.stopped and (self.order.preview or self.began is None)

    def stop(self) -> None:
        self.stopped = True
        self.future.cancel()  # where it has not begun


class Studio:
    """A pipeline that draws one order after another, in the order in which they come.

    Attributes:
      pipeline: That draws.
      given: Flags with which lumina_jax.sample opens the same.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        weights: Mapping[str, Any],
        given: Mapping[str, Any],
        folder: pathlib.Path,
    ):
        """Takes orders from now on.

        Args:
          pipeline: That draws.
          weights: What metadata say of its checkpoint.
          given: Flags with which lumina_jax.sample opens the same.
          folder: For the pictures.
        """
        self.pipeline, self.given = pipeline, given
        self._weights, self._folder = weights, folder
        self._fingerprint = pipeline.fingerprint()
        self._hand = ThreadPoolExecutor(1)
        self._line: list[Drawing] = []
        self._joining = threading.Lock()
        # By kind, of the last drawing; None where that was the first, which was compiled too.
        self._seconds: dict[Any, float | None] = {}

    def begin(self, form: Mapping[str, Any]) -> Drawing:
        """Puts what a form asks for at the end of the line."""
        drawing = Drawing(read(form, self.pipeline))
        with self._joining:
            if len(self._line) > MAX_WAITING:
                raise InputError(f"{MAX_WAITING} drawings are waiting already. Come back later.")
            self._line.append(drawing)
            drawing.future = self._hand.submit(self._draw, drawing)
        drawing.future.add_done_callback(lambda _: self._line.remove(drawing))
        return drawing

    def num_before(self, drawing: Drawing) -> int:
        """How many drawings come before this one."""
        with contextlib.suppress(ValueError):
            return self._line.index(drawing)
        return 0  # it has just ended

    def close(self) -> None:
        """Stops what can be stopped, and waits for the rest."""
        for drawing in list(self._line):
            drawing.stop()
        self._hand.shutdown()

    def _kind(self, order):
        """Equal for orders that one compiled program serves."""
        config = self.pipeline.settings(**order.settings)
        path = self.pipeline.path(order.height, order.width, config, order.strength or 1.0)
        slots = self.pipeline.caption_slots(
            [order.prompt], [order.negative_prompt], order.system_prompt, config.semantics
        )
        return (
            order.preview, order.num_pictures, order.height, order.width, *slots, path.program,
            path.numbers.weights.shape, path.numbers.cache is None, order.image is None,
            order.mask is None, config.rope_scaling, config.proportional_attention,
        )  # fmt: skip

    def _draw(self, drawing):
        order = drawing.order
        kind = self._kind(order)
        drawing.is_first, drawing.usual_seconds = kind not in self._seconds, self._seconds.get(kind)
        drawing.began = time.monotonic()
        try:
            drawn = self.pipeline(
                [order.prompt] * order.num_pictures,
                negative_prompt=order.negative_prompt,
                system_prompt=order.system_prompt,
                seed=order.seed,
                height=order.height,
                width=order.width,
                image=order.image,
                mask=order.mask,
                strength=order.strength,
                preview=drawing.watch if order.preview else None,
                **order.settings,
            )
        except Exception as error:
            # What `watch` raises comes back as an error of the runtime.
            if not drawing.stopped:
                raise
            if drawing.frame is not None:
                self._seconds.setdefault(kind, None)
            raise Stopped from error
        seconds = time.monotonic() - drawing.began
        self._seconds[kind] = None if drawing.is_first else seconds
        # A name that nobody guesses: who knows it can fetch the pictures.
        folder = self._folder / secrets.token_hex(16)
        folder.mkdir()
        start, files, captions = self._write(folder, order, drawn)
        return Drawn(files, captions, start, stage(drawn, order.prompt), seconds)

    def _write(self, folder, order, drawn):
        """Writes pictures, and those that they begin from; gives their paths and captions."""
        start = {}
        for name in ("image", "mask"):
            if (picture := getattr(order, name)) is not None:
                start[name] = folder / f"{name}.png"
                picture.save(start[name])
        metadata = {
            "prompt": order.prompt,
            "negative_prompt": order.negative_prompt,
            "height": order.height,
            "width": order.width,
            **pictures.shared_metadata(
                self.pipeline.settings(**order.settings),
                system_prompt=system_prompts.prefixed("", order.system_prompt),
                start={
                    k: hashlib.sha256(file.read_bytes()).hexdigest() for k, file in start.items()
                },
                strength=order.strength,
                checkpoint=self._weights,
                fingerprint=self._fingerprint,
            ),
        }
        files, captions = [], []
        for row, picture in enumerate(drawn):
            seed = order.seed + row
            path = folder / pictures.file_name(seed, order.prompt)
            own = {"index": row, "seed": seed, "batch": (len(drawn), row)}
            pictures.write_picture(path, picture, {**metadata, **own})
            files.append(str(path))
            captions.append(f"{shortened(order.prompt)} · {seed}")
        return [str(path) for path in start.values()], files, captions


# What the page says, in HTML.

EMPTY_STAGE = '<div class="stage empty">Your picture will appear here.</div>'


def stage(shown: Sequence[Image.Image | np.ndarray], prompt: str) -> str:
    """Pictures side by side, large; they are in the text itself, so that no file is left behind."""
    found = []
    for picture in shown:
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        buffer, small = io.BytesIO(), max(picture.size) <= 256
        picture.save(buffer, "WEBP", lossless=small, quality=50 if small else 92, method=2)
        content = base64.b64encode(buffer.getvalue()).decode()
        found.append(
            f'<img src="data:image/webp;base64,{content}" width="{picture.width}" '
            f'height="{picture.height}" alt="{html.escape(prompt)}">'
        )
    columns = math.ceil(math.sqrt(len(found)))
    return f'<div class="stage" style="--columns: {columns}">{"".join(found)}</div>'


def said(text: str, part: float | None = None) -> str:
    """A line of news, with a bar where it is known how much is done."""
    bar = "" if part is None else f'<div class="bar"><div style="width: {part:.1%}"></div></div>'
    return f'<div class="news" role="status">{html.escape(text)}{bar}</div>'


def refused(text: str) -> str:
    words = html.escape(text).replace("\n", "<br>")
    return f'<div class="news fault" role="alert">{words}</div>'


def progress(drawing: Drawing, num_before: int) -> str:
    """How far a drawing is."""
    frame, usual = drawing.frame, drawing.usual_seconds
    if drawing.began is None:
        others = {0: "Yours is the next", 1: "One drawing comes before yours"}
        return said(f"{others.get(num_before, f'{num_before} drawings come before yours')}.")
    if drawing.stopped:
        return said("Stopping at the next evaluation.")
    if frame is not None:
        left = "" if frame.left is None else f", about {clock(frame.left)} left"
        return said(f"{frame.done} of {frame.total} evaluations{left}.", frame.done / frame.total)
    passed = time.monotonic() - drawing.began
    if drawing.is_first:
        return said(f"The first drawing of this kind: compiling, {clock(passed)} so far.")
    if usual is None:
        return said(f"Drawing, {clock(passed)} so far.")
    known = f"Drawing, {clock(passed)} so far; the last one took {clock(usual)}."
    return said(known, min(passed / usual, 1.0))


def clock(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:59] + "…"


def sizes(pipeline: Pipeline) -> list[Bucket]:
    """The model's own size, then buckets of as many tokens, some wide and some tall."""
    height, width = pipeline.size
    unit, found = pipeline.pixels_per_token, [Bucket(width, height)]
    with contextlib.suppress(InputError):  # some numbers of tokens have no bucket
        buckets = bucket_sizes(height * width // unit**2, unit)
        found += [choose_bucket(*ratio, buckets) for ratio in RATIOS]
    return list(dict.fromkeys(found))
