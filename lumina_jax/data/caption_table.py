"""Captions kept apart from their pictures: a table whose rows are found by the id of a picture.

`tools/caption.py` writes it and `tools/prepare_data.py` reads it, so pictures are captioned again
without being encoded again. A directory of

    settings.json                        what the captions are made of, and how
    captions-000012-0003.jsonl.gz        rows: part 12 of the source, piece 3
    part-000012-0004.npz                 counts and ids of a part; written behind all of its pieces,
                                         of which there are 4
    table.json                           counts of the table; written last: it means "complete"
    ids.npy, places.npy, pieces.npy      where the captions of which id are

A row is a line of JSON, of one picture:

    {"id": "dogs/1.jpg",
     "captions": [{"text": ..., "kind": "long", "language": "en", "model": ..., "prompts": ...,
                   "seed": 0}, ...],
     "excluded": [{"kind": ..., "language": ..., "fault": ..., "detail": ..., "text": ...}, ...],
     "rejected": [["long", "en", "loop"], ...],      answers that were asked for again
     "tokens": [1210, 640],                read and written for it by the models
     "fault": ["truncated", "..."]}        of a picture that could not be captioned, else null

The index has a row for each picture with a caption, in the order of the digests of their ids:
ids.npy the digest [n, 2], places.npy the piece and the line in it [n, 2]. pieces.npy says which
part and number each piece has [p, 2]. It is mapped into memory: a look-up costs the same whatever
the size of the table.
"""

import collections
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import pathlib
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import fsspec
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Int32, UInt64

from lumina_jax import files
from lumina_jax.data.captions import KINDS, Caption
from lumina_jax.data.engine import in_threads
from lumina_jax.data.images import Rejected
from lumina_jax.errors import InputError
from lumina_jax.untrusted import read_json, text, whole

SETTINGS, TABLE = "settings.json", "table.json"
IDS, PLACES, PIECES = "ids.npy", "places.npy", "pieces.npy"
FINISHED = (TABLE, IDS, PLACES, PIECES)  # what `finish` writes
FORMAT = 1  # raise it when a table written before can no longer be read
_REMAKE = "Make the table again with tools/caption.py."
MODES = ("replace", "add")
# Of all tables. The records of a bucket are spread over the source, and so over many pieces.
_PIECES_IN_MEMORY = 64
_MAX_BYTES = 2**28  # of a piece, unpacked
# Of JSON that is nested too deep, and of numbers that are none, the last two.
_DAMAGE = (
    AttributeError, EOFError, IndexError, KeyError, TypeError, ValueError, zlib.error,
    RecursionError, OverflowError,
)  # fmt: skip


class Written(NamedTuple):
    """A caption, and what made it."""

    text: str
    kind: str
    language: str
    model: str
    prompts: str  # the version of the prompts
    seed: int  # of the answer that passed; 0 is the first one

    @property
    def caption(self) -> Caption:
        return Caption(self.text, self.kind, self.language)


class Excluded(NamedTuple):
    """A caption that no attempt got through the gates: the last answer, and what is wrong."""

    kind: str
    language: str
    fault: str
    detail: str
    text: str


class Row(NamedTuple):
    """What is known of one picture.

    Attributes:
        id: of the picture, as its source has it.
        captions: that passed.
        excluded: that did not.
        fault: (reason, detail) of a picture that could not be captioned at all.
        rejected: (kind, language, fault) of every answer that did not pass.
        tokens: read and written for it by the models.
    """

    id: str
    captions: tuple[Written, ...] = ()
    excluded: tuple[Excluded, ...] = ()
    fault: tuple[str, str] | None = None
    rejected: tuple[tuple[str, str, str], ...] = ()
    tokens: tuple[int, int] = (0, 0)


class Piece(NamedTuple):
    """A file of rows."""

    part: int
    number: int

    @property
    def name(self) -> str:
        return f"captions-{self.part:06d}-{self.number:04d}.jsonl.gz"

    @classmethod
    def parse(cls, name: str) -> "Piece | None":
        head, _, rest = name.partition("-")
        part, _, number = rest.removesuffix(".jsonl.gz").partition("-")
        if head == "captions" and name.endswith(".jsonl.gz") and (part + number).isdecimal():
            return cls(int(part), int(number))
        return None


class PartName(NamedTuple):
    """The file that says that a part is done, and with how many pieces."""

    number: int
    num_pieces: int

    def __str__(self) -> str:
        return f"part-{self.number:06d}-{self.num_pieces:04d}.npz"

    @classmethod
    def parse(cls, name: str) -> "PartName | None":
        head, _, rest = name.removesuffix(".npz").partition("-")
        number, _, num_pieces = rest.partition("-")
        if head == "part" and name.endswith(".npz") and (number + num_pieces).isdecimal():
            return cls(int(number), int(num_pieces))
        return None


def write_rows(directory: epath.PathLike, piece: Piece, rows: Iterable[Row]) -> None:
    """Writes a piece; the same rows give the same bytes."""
    content = io.BytesIO()
    with gzip.GzipFile(fileobj=content, mode="wb", mtime=0, filename="") as file:
        for row in rows:
            line = {
                "id": row.id,
                "captions": [caption._asdict() for caption in row.captions],
                "excluded": [caption._asdict() for caption in row.excluded],
                "rejected": row.rejected,
                "tokens": row.tokens,
                "fault": row.fault,
            }
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    files.write(epath.Path(directory) / piece.name, content.getvalue())


def read_rows(directory: epath.PathLike, piece: Piece) -> list[Row]:
    """Returns the rows of a piece, in the order of the source."""
    with _checked(directory, piece):
        return [_row(json.loads(line)) for line in _read_lines(directory, piece)]


def _read_lines(directory: epath.PathLike, piece: Piece) -> list[bytes]:
    unzip = zlib.decompressobj(wbits=31)  # gzip
    content = unzip.decompress((epath.Path(directory) / piece.name).read_bytes(), _MAX_BYTES)
    if unzip.unconsumed_tail:
        raise ValueError(f"it unpacks to more than {_MAX_BYTES:,} bytes")
    if not unzip.eof or unzip.unused_data:
        raise EOFError("its end is missing, or is not where it should be")
    return content.splitlines()


@contextlib.contextmanager
def _checked(directory: epath.PathLike, piece: Piece) -> Iterator[None]:
    """Says of any fault in what a piece holds which file it is in."""
    try:
        yield
    except (FileNotFoundError, *_DAMAGE) as error:
        path = epath.Path(directory) / piece.name
        raise InputError(f"{path} is damaged ({error!r}). Delete it. {_REMAKE}") from error


def _row(line: Mapping[str, Any]) -> Row:
    fault = line["fault"]
    row = Row(
        text(line["id"]),
        tuple(Written(**caption) for caption in line["captions"]),
        tuple(Excluded(**caption) for caption in line["excluded"]),
        None if fault is None else (text(fault[0]), text(fault[1])),
        tuple(
            (text(kind), text(language), text(name)) for kind, language, name in line["rejected"]
        ),
        (int(line["tokens"][0]), int(line["tokens"][1])),
    )
    for caption in (*row.captions, *row.excluded):
        for name, value in caption._asdict().items():
            whole(value, 0, 2**63) if name == "seed" else text(value)
        if caption.kind not in KINDS:
            raise ValueError(f"a caption of kind {caption.kind!r:.60}")
    return row


def pieces(directory: epath.PathLike) -> list[Piece]:
    """Returns the pieces that are there, in order."""
    return sorted(piece for name in files.sizes(directory) if (piece := Piece.parse(name)))


def parts(directory: epath.PathLike) -> dict[int, PartName]:
    """Returns the parts that are done, by number: those with all of their pieces."""
    return _done(files.sizes(directory))


def is_done(directory: epath.PathLike, part: int) -> bool:
    """Whether a part is done. A bucket is asked for names that begin so, not for all of them."""
    fs, root = fsspec.core.url_to_fs(os.fspath(directory))
    found = (
        name for head in ("part", "captions") for name in fs.glob(f"{root}/{head}-{part:06d}-*")
    )
    return part in _done({name.rsplit("/", 1)[-1] for name in found})


def _done(names: Collection[str]) -> dict[int, PartName]:
    found = sorted(part for name in names if (part := PartName.parse(name)))
    return {
        part.number: part
        for part in found
        if all(Piece(part.number, n).name in names for n in range(part.num_pieces))
    }


@runtime_checkable
class Summary(Protocol):
    """Counts of rows, of whatever is of interest to the writer."""

    def merge(self, content: Mapping[str, Any]) -> None:
        """Adds what `to_json` gave for other rows."""
        ...

    def to_json(self) -> dict[str, Any]: ...


class PartIndex:
    """What is known of the rows of a part without their texts: where the ids with captions are."""

    def __init__(self):
        self._ids: list[str] = []
        self._places: list[tuple[int, int]] = []
        self._content = hashlib.sha256()
        self.num_pieces = 0

    def add(self, rows: Sequence[Row]) -> None:
        """Takes the next piece."""
        captioned = [(line, row) for line, row in enumerate(rows) if row.captions]
        self._ids += [row.id for _, row in captioned]
        self._places += [(self.num_pieces, line) for line, _ in captioned]
        said = json.dumps([(row.id, row.captions) for _, row in captioned])
        self._content.update(said.encode())
        self.num_pieces += 1

    def save(self, directory: epath.PathLike, number: int, summary: Summary) -> None:
        """Writes what says that the part is done."""
        content = io.BytesIO()
        np.savez(
            content,
            ids=_digests(self._ids),
            places=np.array(self._places, np.int32).reshape(-1, 2),
            content=np.frombuffer(self._content.digest(), np.uint8),
            summary=np.frombuffer(json.dumps(summary.to_json()).encode(), np.uint8),
        )
        name = str(PartName(number, self.num_pieces))
        files.write(epath.Path(directory) / name, content.getvalue())


def finish(directory: epath.PathLike, summary: Summary) -> None:
    """Writes the index, then `table.json`, which says that all is there.

    It needs about a hundred bytes of memory for a picture. Who does it again writes the same.

    Args:
        directory: of the table; all of its parts are done.
        summary: takes the counts of the parts.
    """
    directory = epath.Path(directory)
    found = list(parts(directory).values())
    digests, places = [np.zeros((0, 2), np.uint64)], [np.zeros((0, 2), np.int32)]
    content, first = hashlib.sha256(), 0
    for part, arrays in zip(
        found, in_threads(functools.partial(_load_part, directory), found), strict=True
    ):
        digests.append(arrays["ids"])
        places.append(arrays["places"] + np.array([[first, 0]], np.int32))
        content.update(arrays["content"].tobytes())
        summary.merge(json.loads(arrays["summary"].tobytes()))
        first += part.num_pieces
    ids, places = np.concatenate(digests), np.concatenate(places)
    del digests
    order = np.lexsort((ids[:, 1], ids[:, 0]))  # stable: of equal ids the first one stays first
    ids = ids[order]
    if repeated := int((ids[1:] == ids[:-1]).all(axis=1).sum()):
        logging.warning(
            "%d captioned pictures of %s have the id of one before them, whose captions are found.",
            repeated, directory,
        )  # fmt: skip
    every = [(part.number, number) for part in found for number in range(part.num_pieces)]
    _save(directory / IDS, ids)
    _save(directory / PLACES, places[order])
    _save(directory / PIECES, np.array(every, np.int32).reshape(-1, 2))
    table = {
        "format": FORMAT,
        "fingerprint": content.hexdigest(),
        "repeated_ids": repeated,
        "summary": summary.to_json(),
    }
    files.write(directory / TABLE, json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def _load_part(directory: epath.Path, part: PartName) -> dict[str, np.ndarray]:
    path = directory / str(part)
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            found = dict(arrays)
        if found["ids"].shape != found["places"].shape or found["ids"].shape[1:] != (2,):
            raise ValueError(f"shapes {found['ids'].shape} and {found['places'].shape}")
        return found
    except (zipfile.BadZipFile, *_DAMAGE) as error:
        raise InputError(f"{path} is damaged ({error!r}). Delete it. {_REMAKE}") from error


def _save(path: epath.Path, array: np.ndarray) -> None:
    with files.aside(path) as local, local.open("wb") as file:
        np.save(file, array, allow_pickle=False)


@dataclasses.dataclass(frozen=True)
class Table:
    """A complete table to look captions up in. It is small, and can be sent to workers.

    Attributes:
        directory: of it.
        fingerprint: changes with any caption.
        settings: what it was made with.
        summary: its counts.
    """

    directory: str
    fingerprint: str
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]

    @classmethod
    def load(cls, directory: epath.PathLike) -> "Table":
        path = epath.Path(directory) / TABLE
        try:
            content = read_json(path, _REMAKE)
        except (FileNotFoundError, NotADirectoryError):
            begun = (epath.Path(directory) / SETTINGS).exists()
            what = (
                "is not finished: give the tools/caption.py command again that began it"
                if begun
                else "is no table of captions: make one with tools/caption.py"
            )
            raise InputError(f"{os.fspath(directory)} {what}. It has no {TABLE}.") from None
        try:
            if content["format"] != FORMAT:
                raise InputError(
                    f"{path} has format {content['format']}; this version reads {FORMAT}. {_REMAKE}"
                )
            return cls(
                os.fspath(directory),
                text(content["fingerprint"]),
                read_json(epath.Path(directory) / SETTINGS, _REMAKE),
                content["summary"],
            )
        except InputError:
            raise
        except (KeyError, ValueError, OSError) as error:
            raise InputError(f"{path} is damaged ({error!r}). {_REMAKE}") from error

    def rows(self) -> Iterator[Row]:
        """Yields every row, in the order of the source."""
        for piece in _index(self.directory, self.fingerprint).pieces.tolist():
            yield from read_rows(self.directory, Piece(*piece))

    def find(self, ids: Sequence[str]) -> list[tuple[Caption, ...]]:
        """Returns the captions of pictures, () for those of which the table has none.

        A piece is read as a whole, and the last ones stay in memory: ids are best asked for in an
        order near that of the source.
        """
        index = _index(self.directory, self.fingerprint)
        digests = _digests(ids)
        firsts, lasts = (
            np.searchsorted(index.ids[:, 0], digests[:, 0], side).tolist()
            for side in ("left", "right")
        )
        wanted: dict[Piece, list[tuple[int, int]]] = collections.defaultdict(list)
        for number, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
            for place in range(first, last):
                if index.ids[place, 1] == digests[number, 1]:
                    piece, line = index.places[place].tolist()
                    wanted[Piece(*index.pieces[piece].tolist())].append((number, line))
                    break
        found: list[tuple[Caption, ...]] = [()] * len(ids)
        # Waiting for a bucket is most of a look-up there; a local file is in memory or soon is.
        run = in_threads if files.is_remote(self.directory) and len(wanted) > 1 else map
        contents = run(self._lines, list(wanted))
        for (piece, places), lines in zip(wanted.items(), contents, strict=True):
            with _checked(self.directory, piece):
                for number, line in places:
                    row = _row(json.loads(lines[line]))
                    if row.id != ids[number]:
                        raise ValueError(f"{row.id!r:.60} is where {ids[number]!r:.60} was")
                    found[number] = tuple(caption.caption for caption in row.captions)
        return found

    def _lines(self, piece: Piece) -> list[bytes]:
        return _kept_lines(self.directory, piece, self.fingerprint)


@dataclasses.dataclass(frozen=True)
class Merge:
    """Captions of tables for pictures that have some, or none, of their own.

    Args:
        tables: the captions of the first ones come first.
        mode: "replace" takes the tables' alone, "add" those of the picture before them.
    """

    tables: tuple[Table, ...]
    mode: str = "replace"

    def __post_init__(self):
        if self.mode not in MODES:
            raise InputError(f"Caption mode {self.mode!r}; needed: {' or '.join(MODES)}.")
        directories = [table.directory for table in self.tables]
        if not directories or len(set(directories)) < len(directories):
            raise InputError(
                f"Caption tables {', '.join(directories) or '()'}: need one or more, each once."
            )

    def settings(self) -> dict[str, Any]:
        """What must be equal for captions to be the same; it can be written as JSON."""
        fingerprints = [table.fingerprint for table in self.tables]
        return {"caption_mode": self.mode, "caption_tables": fingerprints}

    def captions(
        self, ids: Sequence[str], own: Sequence[tuple[Caption, ...]]
    ) -> list[tuple[Caption, ...]]:
        """Returns the captions of pictures, each caption of a picture once."""
        columns = [table.find(ids) for table in self.tables]
        if self.mode == "add":
            columns.insert(0, list(own))
        return [
            tuple(dict.fromkeys(itertools.chain(*found))) for found in zip(*columns, strict=True)
        ]

    def missing(self) -> Rejected:
        """What is wrong with a picture that has no caption after all."""
        where = "no table has it" if self.mode == "replace" else "neither it nor a table has one"
        return Rejected("no caption", where)


@functools.lru_cache(_PIECES_IN_MEMORY)
def _kept_lines(directory: str, piece: Piece, fingerprint: str) -> list[bytes]:
    del fingerprint  # another table may be where one was
    with _checked(directory, piece):
        return _read_lines(directory, piece)


class _Index(NamedTuple):
    ids: UInt64[np.ndarray, "n 2"]
    places: Int32[np.ndarray, "n 2"]
    pieces: Int32[np.ndarray, "p 2"]


@functools.lru_cache(8)
def _index(directory: str, fingerprint: str) -> _Index:
    """The index, mapped into memory, which the processes of a machine share."""
    del fingerprint
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(directory)
        if files.is_remote(directory):
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            fs, root = fsspec.core.url_to_fs(directory)
            for name in (IDS, PLACES, PIECES):
                fs.get_file(f"{root}/{name}", str(folder / name))
        try:
            # What is mapped stays readable when its folder is removed.
            ids, places, pieces = (
                np.load(folder / name, mmap_mode="r", allow_pickle=False)
                for name in (IDS, PLACES, PIECES)
            )
            if ids.shape != places.shape or any(a.shape[1:] != (2,) for a in (ids, pieces)):
                raise ValueError(f"shapes {ids.shape}, {places.shape} and {pieces.shape}")
        except (OSError, ValueError) as error:
            raise InputError(f"The index of {directory} is damaged ({error}). {_REMAKE}") from error
    return _Index(ids, places, pieces)


def _digests(ids: Sequence[str]) -> UInt64[np.ndarray, "n 2"]:
    content = b"".join(hashlib.blake2b(id.encode(), digest_size=16).digest() for id in ids)
    return np.frombuffer(content, np.uint64).reshape(-1, 2)
