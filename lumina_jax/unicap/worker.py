"""Captioning a source of pictures: any number of workers, killed at any moment.

    parts of a source, worker i takes i, i + n, ... -> caption_part -> pieces of rows, part by part
    all parts there                                 -> finish       -> index and counts: the table

A piece of some hundred rows appears under its name when it is whole, and is left alone when it is
there. So a worker that was killed goes on behind its last piece, and where parts are captioned
(here, by many hosts, on Apache Beam; see `data.engine`) changes nothing in the table. One thing is
left to chance: which of two pictures of a part keeps a caption that the model gave to both.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

from etils import epath
from PIL import Image

from lumina_jax import files
from lumina_jax.data import caption_table, images
from lumina_jax.data.caption_table import Piece, Row
from lumina_jax.data.images import Rejected
from lumina_jax.data.sources.base import Item, Part, Source
from lumina_jax.errors import InputError, differences
from lumina_jax.unicap.backends import Opener, opened
from lumina_jax.unicap.backends.base import Backend
from lumina_jax.unicap.captioner import Captioner, Conversation, Wanted
from lumina_jax.unicap.gates import Gates
from lumina_jax.unicap.pictures import describe_source
from lumina_jax.unicap.prompts import Prompts
from lumina_jax.unicap.report import Counts
from lumina_jax.untrusted import read_json

REPORT = "report.json"
_MIN_PIXELS = 28 * 28  # a token of Qwen2-VL
_MAX_ASPECT = 200  # of a longer side to a shorter; the models take no more
_DECODING = threading.BoundedSemaphore(os.cpu_count() or 1)  # a large picture takes 300 MB
PIECE_SIZE = 256  # pictures; at most so many are captioned again after a kill, for each worker
# progress(done): so many pictures of the part have their rows.
Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is captioned, how, and where to; it is sent to where the work is done.

    Args:
        source: of the pictures, read with `needs_captions=False`.
        directory: of the table.
        wanted: which captions.
        prompts: what is asked.
        open_backend: opens the models, once in each process; equal ones open the same.
        models: their names: of the one that sees pictures, of the one that works on text.
        max_pixels: of a picture as the model sees it; larger ones are scaled down.
        count_tokens: of a text as the text encoder of training reads it; None counts none.
        max_tokens: that it reads.
    """

    source: Source
    directory: str
    wanted: Wanted
    prompts: Prompts
    open_backend: Opener
    models: tuple[str, str]
    max_pixels: int = 1_003_520  # 1280 tokens of Qwen2-VL
    count_tokens: Callable[[Sequence[str]], Sequence[int]] | None = None
    max_tokens: int = 256

    def __post_init__(self):
        if not _MIN_PIXELS <= self.max_pixels <= images.MAX_PIXELS:
            raise InputError(
                f"max_pixels={self.max_pixels} must be {_MIN_PIXELS} to {images.MAX_PIXELS:,}."
            )

    def settings(self) -> dict[str, Any]:
        """What must be equal for a table to be gone on with, as JSON knows it."""
        counter = self.count_tokens and [repr(self.count_tokens), self.max_tokens]
        given = {
            "format": caption_table.FORMAT,
            "source": describe_source(self.source),
            "parts": _digest(self.parts),
            "piece_size": PIECE_SIZE,
            "models": list(self.models),
            "prompts": self.prompts.version,
            "max_pixels": self.max_pixels,
            "text_encoder": counter,
            **dataclasses.asdict(self.wanted),
        }
        return json.loads(json.dumps(given))

    def begin(self, *, overwrite: bool = False) -> None:
        """Writes the settings, or checks that those which are there are these."""
        folder, mine = epath.Path(self.directory), self.settings()
        path = folder / caption_table.SETTINGS
        there = files.sizes(folder)
        if overwrite and caption_table.SETTINGS in there:
            remove(folder)
        elif caption_table.SETTINGS in there:
            theirs = read_json(path, "Give --overwrite to begin again.")
            if found := differences(theirs, mine):
                raise InputError(
                    f"{folder} holds another table of captions: {found}. Choose another directory, "
                    "ask for the same, or replace it with --overwrite."
                )
            if caption_table.TABLE in there and self.missing():  # somebody deleted a piece
                (folder / caption_table.TABLE).unlink(missing_ok=True)
            return
        elif there:
            raise InputError(
                f"{folder} holds {', '.join(sorted(there)[:3])} and is no table of captions. "
                "Choose another directory."
            )
        files.write(path, json.dumps(mine, indent=1, ensure_ascii=False) + "\n")

    def missing(self, worker: int = 0, num_workers: int = 1) -> list[int]:
        """Returns the numbers of the parts of a worker that are still to be captioned."""
        if not 0 <= worker < num_workers:
            raise InputError(
                f"worker={worker} of num_workers={num_workers}: there must be 1 or more, and they "
                "are counted from 0."
            )
        done = caption_table.parts(self.directory)
        return [n for n in range(worker, len(self.parts), num_workers) if n not in done]

    def caption_part(self, number: int, progress: Progress = lambda done: None) -> None:
        """Writes the pieces of a part that are not there yet, then its counts and ids."""
        if caption_table.is_done(self.directory, number):
            return
        opened(self.open_backend)  # before the clock runs: it may take minutes
        counts, index = Counts(self.count_tokens, self.max_tokens), caption_table.PartIndex()
        gates = Gates(self.prompts, self.wanted.languages)

        def take(rows: Sequence[Row]) -> None:
            index.add(rows)
            for row in rows:
                counts.add(row)

        last = PIECE_SIZE
        while last == PIECE_SIZE and (rows := self._read(number, index.num_pieces)) is not None:
            take(rows)
            last = len(rows)
            for row in rows:
                for caption in row.captions:
                    gates.claim(caption.text, caption.kind, row.id)
        began, done = time.monotonic(), counts.num_pictures
        items = itertools.islice(self.source.read(self.parts[number]), done, None)
        rows = self._rows(items if last == PIECE_SIZE else (), gates)
        while chunk := list(itertools.islice(_told(rows, progress, counts), PIECE_SIZE)):
            # Who has the same number as this worker may have been here before it.
            if (theirs := self._read(number, index.num_pieces)) is None:
                piece = Piece(number, index.num_pieces)
                caption_table.write_rows(self.directory, piece, chunk)
            take(chunk if theirs is None else theirs)
        counts.time(counts.num_pictures - done, time.monotonic() - began)
        index.save(self.directory, number, counts)

    def _read(self, part: int, piece: int) -> list[Row] | None:
        """Returns the rows of a piece that is there."""
        path = epath.Path(self.directory) / Piece(part, piece).name
        return (
            caption_table.read_rows(self.directory, Piece(part, piece)) if path.exists() else None
        )

    def _rows(self, items: Iterable[Item], gates: Gates) -> Iterator[Row]:
        """Yields the row of each item, in order."""
        backend = opened(self.open_backend)
        captioner = Captioner(self.wanted, self.prompts, *self.models)

        def begin(item: Item) -> Row | Conversation:
            try:
                image = _picture(item, self.max_pixels)
            except Rejected as fault:
                return Row(item.id, fault=(fault.reason, fault.detail))
            return captioner.converse(item.id, image, gates)

        run = _in_threads if backend.in_threads else _in_step
        return run(backend, items, begin)

    @functools.cached_property
    def parts(self) -> Sequence[Part]:
        """Of the source; those of a large one take a while to be found."""
        return self.source.parts()

    def __getstate__(self) -> dict[str, Any]:
        """Without the parts, which another process finds itself."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def finish(self) -> Counts | None:
        """Makes the table of all parts, and returns its counts; None while some are missing."""
        if self.missing():
            return None
        folder = epath.Path(self.directory)
        counts = Counts(self.count_tokens, self.max_tokens)
        if (folder / caption_table.TABLE).exists():
            counts.merge(caption_table.Table.load(folder).summary)
        else:
            files.remove_asides(folder, of=("captions-", "part-"))  # of those who were killed
            caption_table.finish(folder, counts)
        return counts


def remove(directory: epath.PathLike) -> None:
    """Removes a table, finished or not, and nothing else that may lie beside it."""
    names = files.sizes(directory)
    files.remove_asides(directory, of=("captions-", "part-"))
    # What says that others are there goes before them.
    for ours in (
        [name for name in (*caption_table.FINISHED, REPORT) if name in names],
        [name for name in names if caption_table.PartName.parse(name)],
        [name for name in names if Piece.parse(name)],
        [caption_table.SETTINGS],
    ):
        files.remove_names(directory, ours)


def scale_down(image: Image.Image, max_pixels: int) -> Image.Image:
    """Returns a picture of at most so many pixels, of the same shape."""
    share = (max_pixels / (image.width * image.height)) ** 0.5
    if share >= 1:
        return image
    size = max(1, int(image.width * share)), max(1, int(image.height * share))
    return image.resize(size, Image.Resampling.LANCZOS)


def _picture(item: Item, max_pixels: int) -> Image.Image:
    """Returns the picture as a model sees it."""
    if item.fault is not None:
        raise item.fault
    with _DECODING:
        drawn = isinstance(item.image, Image.Image)
        image = images.to_rgb(item.image) if drawn else images.decode(item.image)
        if max(image.size) > _MAX_ASPECT * min(image.size):
            raise Rejected("too narrow", f"{image.width} x {image.height}")
        return scale_down(image, max_pixels)


def _told(rows: Iterator[Row], progress: Progress, counts: Counts) -> Iterator[Row]:
    """Yields the rows of a piece, and tells how many of the part there are."""
    for number, row in enumerate(rows, start=1):
        progress(counts.num_pictures + number)
        yield row


Begin = Callable[[Item], Row | Conversation]


def _in_threads(backend: Backend, items: Iterable[Item], begin: Begin) -> Iterator[Row]:
    """Runs a conversation in each of many threads; a row comes when those before it are done."""
    # Daemons, unlike those of a pool of `concurrent.futures`: nobody who interrupts the program
    # waits for a server that does not answer.
    todo: queue.SimpleQueue[tuple[futures.Future[Row], Item] | None] = queue.SimpleQueue()
    ended = threading.Event()

    def converse(item: Item) -> Row:
        begun = begin(item)
        if isinstance(begun, Row):
            return begun
        try:
            request = next(begun)
            while not ended.is_set():
                (reply,) = backend.ask([request])
                request = begun.send(reply)
        except StopIteration as end:
            return end.value
        raise futures.CancelledError

    def work() -> None:
        while (task := todo.get()) is not None:
            future, item = task
            try:
                future.set_result(converse(item))
            except BaseException as error:
                future.set_exception(error)

    for number in range(backend.num_pictures):
        threading.Thread(target=work, name=f"caption-{number}", daemon=True).start()
    running: collections.deque[futures.Future[Row]] = collections.deque()
    try:
        # Twice as many begun as are under way: one that takes long holds up only what follows.
        for item in items:
            running.append(futures.Future())
            todo.put((running[-1], item))
            while running and (running[0].done() or len(running) >= 2 * backend.num_pictures):
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        ended.set()
        for _ in range(backend.num_pictures):
            todo.put(None)


def _in_step(backend: Backend, items: Iterable[Item], begin: Begin) -> Iterator[Row]:
    """Runs conversations together: what all of them ask next is asked at once."""
    for chunk in _batched(items, backend.num_pictures):
        rows: dict[int, Row] = {}
        talks: dict[int, Conversation] = {}
        for number, item in enumerate(chunk):
            begun = begin(item)
            if isinstance(begun, Row):
                rows[number] = begun
            else:
                talks[number] = begun
        requests = {number: next(talk) for number, talk in talks.items()}
        while requests:
            numbers = list(requests)
            replies = backend.ask([requests[number] for number in numbers])
            requests = {}
            for number, reply in zip(numbers, replies, strict=True):
                try:
                    requests[number] = talks[number].send(reply)
                except StopIteration as end:
                    rows[number] = end.value
        yield from (rows[number] for number in range(len(chunk)))


def _batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _digest(parts: Sequence[Part]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(dataclasses.astuple(part)).encode())
    return digest.hexdigest()
