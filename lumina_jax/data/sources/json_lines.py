"""A list of pictures and captions in JSON: the format that Lumina-Image 2.0 is fine-tuned with.

    {"image_path": "a.jpg", "prompt": "A dog."}

one object a line (`.jsonl`), or a list of them (`.json`). Upstream's README and its code spell the
keys differently, and `metadata.jsonl` of Hugging Face in a third way; all are read.
"""

import dataclasses
import io
import itertools
import json
import re
from collections.abc import Iterator
from typing import ClassVar

from lumina_jax.data.images import Rejected
from lumina_jax.data.sources.base import Item, Part
from lumina_jax.data.sources.metadata import CaptionedSource, faulty, make_item
from lumina_jax.data.sources.reading import (
    join,
    list_files,
    open_filesystem,
    parse_object,
    read_file,
)
from lumina_jax.errors import InputError

PATH_KEYS = ("image_path", "path", "image", "image_url", "file_name")
BYTES_PER_PART = 2**18  # about a thousand rows
MAX_LINE = 2**24  # bytes; a file without line ends is not taken into memory
MAX_LIST = 2**31  # bytes
_BETWEEN = re.compile(r"[ \t\r\n,]*")


@dataclasses.dataclass(frozen=True)
class JsonSource(CaptionedSource):
    """Pictures named in JSON files. The id of one is its path as it is written there.

    Args:
        root: where paths that are not absolute start; by default the folder of their JSON file.
    """

    root: str = ""

    name: ClassVar[str] = "json"

    def parts(self) -> list[Part]:
        """Ranges of bytes; a row belongs to the one that it begins in."""
        parts = []
        for path, name in list_files(self.path, (".jsonl", ".json")):
            fs, file = open_filesystem(path)
            if path.lower().endswith(".json"):
                # A list has no row ends to look for, so it is read once as a whole.
                if fs.size(file) > MAX_LIST:
                    raise InputError(
                        f"{path} has more than {MAX_LIST:,} bytes, and a list is read as a whole. "
                        "Write one object a line, into a file that ends in .jsonl."
                    )
                with fs.open(file, "rb") as stream:
                    bounds = _list_bounds(stream.read(), path)
            else:
                bounds = [*range(0, fs.size(file), BYTES_PER_PART), fs.size(file)]
            parts += [
                Part(path, start, stop, (name,)) for start, stop in itertools.pairwise(bounds)
            ]
        if not parts:
            raise InputError(f"{self.path} holds no row. Give a file that names pictures.")
        return parts

    def read(self, part: Part) -> Iterator[Item]:
        fs, file = open_filesystem(part.path)
        root = self.root or part.path.rpartition("/")[0]
        rows = _elements if part.path.lower().endswith(".json") else _lines
        with fs.open(file, "rb") as raw, io.BufferedReader(raw, 2**20) as stream:
            for at, row in rows(stream, part):
                name = f"{part.names[0]}:byte {at}"
                try:
                    if len(row) >= MAX_LINE:
                        raise Rejected("broken JSON", f"a row of {MAX_LINE:,} bytes or more")
                    metadata = parse_object(row)
                    paths = (metadata.get(key) for key in PATH_KEYS)
                    path = next((p for p in paths if p and isinstance(p, str)), None)
                    if path is None:
                        raise Rejected("no picture path", f"none of {', '.join(PATH_KEYS)} is text")
                    # Several files may each name pictures of their own folder alike.
                    name = path if self.root else join(part.names[0].rpartition("/")[0], path)
                    name = name.removeprefix("/") if not path.startswith("/") else name
                    captions = self.captions_of(metadata)
                    item = make_item(name, read_file(join(root, path)), captions, metadata)
                except Rejected as fault:
                    item = faulty(name, fault)
                yield item


def _lines(stream: io.BufferedReader, part: Part) -> Iterator[tuple[int, bytes]]:
    """Yields the lines that begin in a range of bytes, and where; blank ones are none."""
    at = part.start
    if at:
        stream.seek(at - 1)  # a line that begins at `at` has its end before it
        at += _skip_line(stream) - 1
    while at < part.stop and (line := stream.readline(MAX_LINE)):
        begin, at = at, at + len(line)
        if len(line) == MAX_LINE and line[-1:] != b"\n":
            at += _skip_line(stream)
        if line.strip():
            yield begin, line


def _skip_line(stream: io.BufferedReader) -> int:
    """Goes to the end of the line, and returns how many bytes that was."""
    size = 0
    while piece := stream.readline(MAX_LINE):
        size += len(piece)
        if piece[-1:] == b"\n":
            break
    return size


def _elements(stream: io.BufferedReader, part: Part) -> Iterator[tuple[int, str]]:
    """Yields the text of the elements of a list in a range of bytes, and where each begins."""
    stream.seek(part.start)
    text = stream.read(part.stop - part.start).decode()
    at = part.start
    end = 0
    for begin, stop in _spans(text):
        at += begin - end
        yield at, text[begin:stop]
        at += len(text[begin:stop].encode())
        end = stop


def _list_bounds(content: bytes, path: str) -> list[int]:
    """Returns where a JSON list may be cut: between elements, a part's worth of bytes apart."""
    begin, stop = content.find(b"[") + 1, content.rfind(b"]")
    around = content[: max(begin - 1, 0)] + content[stop + 1 :]
    try:
        if not 0 < begin <= stop or around.strip(b"\xef\xbb\xbf \t\r\n"):
            raise ValueError("it does not begin with [ and end with ]")
        text = content[begin:stop].decode()
        bounds, at, end = [begin], begin, 0
        for first, last in _spans(text):
            at += first - end
            if at - bounds[-1] >= BYTES_PER_PART:
                bounds.append(at)
            at += len(text[first:last].encode())
            end = last
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not a JSON list: {error}. A file with one object a line must be called "
            ".jsonl."
        ) from error
    return [*bounds, stop] if end else []


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Yields where each JSON value of a row of them begins and ends."""
    decoder = json.JSONDecoder()
    begin = _BETWEEN.match(text).end()
    while begin < len(text):
        _, stop = decoder.raw_decode(text, begin)
        yield begin, stop
        begin = _BETWEEN.match(text, stop).end()
