"""Captioning a source of pictures: any number of workers, killed at any moment.

    parts of a source, worker i takes i, i + n, ... -> caption_part -> pieces of rows, part by part
    all parts there                                 -> finish       -> index and counts: the table

A piece of some hundred rows appears under its name when it is whole, and is left alone when it is
there. So a worker that was killed goes on behind its last piece, and where parts are captioned
(here, by many hosts, on Apache Beam; see `data.engine`) changes nothing in the table.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

from etils import epath
from PIL import Image

from lumina_jax import files
from lumina_jax.data import caption_table, images
from lumina_jax.data.caption_table import Piece, Row
from lumina_jax.data.images import Rejected
from lumina_jax.data.sources.base import Item, Part, Source
from lumina_jax.errors import InputError
from lumina_jax.unicap.backends import Opener, opened
from lumina_jax.unicap.backends.base import Backend
from lumina_jax.unicap.captioner import Captioner, Conversation, Wanted
from lumina_jax.unicap.gates import Gates
from lumina_jax.unicap.pictures import describe_source
from lumina_jax.unicap.prompts import Prompts
from lumina_jax.unicap.report import Counts

REPORT = "report.json"
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

    def settings(self) -> dict[str, Any]:
        """What must be equal for a table to be gone on with, as JSON knows it."""
        given = {
            "format": caption_table.FORMAT,
            "source": describe_source(self.source),
            "parts": _digest(self.parts),
            "models": list(self.models),
            "prompts": self.prompts.version,
            "max_pixels": self.max_pixels,
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
            check_same(folder, json.loads(path.read_text()), mine)
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
                f"worker={worker} of num_workers={num_workers}: workers are counted from 0."
            )
        there = files.sizes(self.directory)
        mine = range(worker, len(self.parts), num_workers)
        return [number for number in mine if caption_table.part_name(number) not in there]

    def caption_part(self, number: int, progress: Progress = lambda done: None) -> None:
        """Writes the pieces of a part that are not there yet, then its counts."""
        counts_path = epath.Path(self.directory) / caption_table.part_name(number)
        if counts_path.exists():
            return
        opened(self.open_backend)  # before the clock runs: it may take minutes
        counts = Counts(self.count_tokens, self.max_tokens)
        gates = Gates(self.prompts, self.wanted.languages)
        num_pieces = self._read_back(number, counts, gates)
        items = itertools.islice(
            self.source.read(self.parts[number]), num_pieces * PIECE_SIZE, None
        )
        began, done = time.monotonic(), counts.num_pictures
        rows = self._rows(items, gates)
        for piece in itertools.count(num_pieces):
            chunk = []
            for row in itertools.islice(rows, PIECE_SIZE):
                chunk.append(row)
                progress(counts.num_pictures + len(chunk))
            if not chunk:
                break
            caption_table.write_rows(self.directory, Piece(number, piece), chunk)
            for row in chunk:
                counts.add(row)
        counts.time(counts.num_pictures - done, time.monotonic() - began)
        files.write(counts_path, json.dumps(counts.to_json(), ensure_ascii=False))

    def _read_back(self, number: int, counts: Counts, gates: Gates) -> int:
        """Takes the pieces of a part that an earlier worker wrote; returns how many."""
        mine = [p.number for p in caption_table.pieces(self.directory) if p.part == number]
        whole = 0
        for piece in mine:
            if piece != whole:
                break  # a hole; what lies behind it is written again
            rows = caption_table.read_rows(self.directory, Piece(number, piece))
            if len(rows) < PIECE_SIZE:
                break  # the last one of a part; it costs little
            for row in rows:
                counts.add(row)
                for caption in row.captions:
                    gates.remember(caption.text, caption.kind, row.id)
            whole += 1
        return whole

    def _rows(self, items: Iterable[Item], gates: Gates) -> Iterator[Row]:
        """Yields the row of each item, in order."""
        backend = opened(self.open_backend)
        captioner = Captioner(self.wanted, self.prompts, *self.models)

        def begin(item: Item) -> Row | Conversation:
            try:
                image = scale_down(_picture(item), self.max_pixels)
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
        for number in range(len(self.parts)):
            content = json.loads((folder / caption_table.part_name(number)).read_text())
            counts.merge(content)
        if not (folder / caption_table.TABLE).exists():
            files.remove_asides(folder)
            caption_table.finish(folder, counts.to_json())
        return counts


def remove(directory: epath.PathLike) -> None:
    """Removes a table, finished or not, and nothing else that may lie beside it."""
    folder = epath.Path(directory)
    names = files.sizes(folder)
    known = (*caption_table.FINISHED, REPORT)
    ours = [name for name in known if name in names]  # what says "complete" goes first
    ours += [n for n in names if Piece.parse(n) or (n.startswith("part-") and n.endswith(".json"))]
    for name in (*ours, caption_table.SETTINGS):
        (folder / name).unlink(missing_ok=True)


def check_same(
    directory: epath.PathLike, there: Mapping[str, Any], here: Mapping[str, Any]
) -> None:
    differences = [
        f"{name} is {there.get(name)!r:.200} there and {here.get(name)!r:.200} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if differences:
        raise InputError(
            f"{directory} holds another table of captions: {'; '.join(differences)}. Choose "
            "another directory, ask for the same, or replace it with --overwrite."
        )


def scale_down(image: Image.Image, max_pixels: int) -> Image.Image:
    """Returns a picture of at most so many pixels, of the same shape."""
    share = (max_pixels / (image.width * image.height)) ** 0.5
    if share >= 1:
        return image
    size = max(1, int(image.width * share)), max(1, int(image.height * share))
    return image.resize(size, Image.Resampling.LANCZOS)


def _picture(item: Item) -> Image.Image:
    if item.fault is not None:
        raise item.fault
    if isinstance(item.image, Image.Image):
        return images.to_rgb(item.image)
    return images.decode(item.image)


Begin = Callable[[Item], Row | Conversation]


def _in_threads(backend: Backend, items: Iterable[Item], begin: Begin) -> Iterator[Row]:
    """Runs a conversation in each of many threads; a row comes when those before it are done."""

    def converse(item: Item) -> Row:
        begun = begin(item)
        if isinstance(begun, Row):
            return begun
        try:
            request = next(begun)
            while True:
                if ended:
                    raise futures.CancelledError
                (reply,) = backend.ask([request])
                request = begun.send(reply)
        except StopIteration as end:
            return end.value

    ended: list[bool] = []
    running: collections.deque[futures.Future[Row]] = collections.deque()
    pool = futures.ThreadPoolExecutor(backend.num_pictures)
    try:
        # Twice as many begun as are under way: one that takes long holds up only what follows.
        for item in items:
            running.append(pool.submit(converse, item))
            while running and (running[0].done() or len(running) >= 2 * backend.num_pictures):
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        ended.append(True)
        pool.shutdown(cancel_futures=True)


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
