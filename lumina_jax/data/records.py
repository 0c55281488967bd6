"""Records on disk: ArrayRecord shards, one TFDS split per bucket, and a manifest beside them.

A dataset directory holds

    manifest.json                                what is here; written last: it means "complete"
    dataset_info.json, features.json             TFDS's own description
    pictures-train_1024x1024.array_record-...    the records of one bucket, resized already

TensorFlow is not needed to write or to read it, and any TFDS tool can open it:
`tfds.builder_from_directory(directory).as_data_source("train_1024x1024")`. Training reads the
records itself: a record is a tf.train.Example, and parsing that alone takes a twelfth of the time.

A record may also hold what frozen networks made of it: `latents` of the picture, and `cap_feats`,
one for each caption. They are bytes of bfloat16, whose shapes the manifest gives; see `CACHES`.
"""

import base64
import bisect
import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import pathlib
import re
import resource
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import fsspec
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from google.protobuf.message import DecodeError
from jaxtyping import BFloat16
from ml_dtypes import bfloat16
from tensorflow_datasets.proto import tf_example_pb2

from lumina_jax import files
from lumina_jax.data.buckets import Bucket
from lumina_jax.data.captions import KINDS, Caption
from lumina_jax.data.images import MAX_PIXELS, Rejected
from lumina_jax.errors import InputError
from lumina_jax.untrusted import MAX_WIDTH, read_json, text, whole
from lumina_jax.version import __version__

MANIFEST = "manifest.json"
UNFINISHED = "unfinished"  # a folder for those who make a dataset, in the directory of it
MARKERS = ("settings.json", "fingerprint")  # say there whose it is: of prepare, of copies
# Raise it when a dataset written before can no longer be read.
FORMAT = 2
REMAKE = "Make the dataset again with tools/prepare_data.py and --overwrite."
_TFDS_FILES = ("dataset_info.json", "features.json", "LICENSE")
DAMAGED = "damaged record"
_ROWS_AT_ONCE = 64
# What a manifest may say. A name that is a path would lead out of the directory.
_SHARD_NAME = re.compile(r"pictures-train_\d+x\d+\.array_record-\d{5,}-of-\d{5,}", re.ASCII)
_MAX_SIDE, _MAX_RECORDS, _MAX_BYTES = 2**16, 2**32, 2**48
_MAX_FEATURES = 2**28  # numbers of one record's latents, or of a caption's features


class Record:
    """A stored record. Raises Rejected where the bytes are none; the picture stays in them.

    Attributes:
        id: of the picture.
        captions: of it.
        size: width and height of the original.
    """

    def __init__(self, content: bytes):
        try:
            self._example = tf_example_pb2.Example.FromString(content)
            self._feature = self._example.features.feature
            self.id = self._bytes("id").decode()
            self.captions, self.size = self._captions(), self._size()
        except (DecodeError, ValueError) as error:
            raise Rejected(DAMAGED, str(error)) from error

    def _bytes(self, name: str) -> bytes:
        values = self._feature[name].bytes_list.value
        if len(values) != 1:
            raise Rejected(DAMAGED, f"{len(values)} values of {name}, and there is always one")
        return values[0]

    def _captions(self) -> tuple[Caption, ...]:
        columns = [
            [value.decode() for value in self._feature[f"captions/{name}"].bytes_list.value]
            for name in Caption._fields
        ]
        captions = tuple(map(Caption._make, zip(*columns, strict=True)))
        if unknown := {caption.kind for caption in captions} - set(KINDS):
            raise Rejected(DAMAGED, f"a caption of kind {min(unknown)!r:.60}")
        return captions

    def _size(self) -> tuple[int, int]:
        width, height = (self._feature[name].int64_list.value for name in ("width", "height"))
        if len(width) != 1 or len(height) != 1 or min(*width, *height) < 1:
            raise Rejected(DAMAGED, f"width {list(width)!s:.60} and height {list(height)!s:.60}")
        return width[0], height[0]

    @property
    def source(self) -> str:
        return self._bytes("source").decode(errors="backslashreplace")

    @property
    def image(self) -> bytes:
        """The encoded picture, of exactly the bucket's size."""
        return self._bytes("image")

    @property
    def latents(self) -> bytes:
        return self._bytes("latents")

    @property
    def cap_feats(self) -> Sequence[bytes]:
        """Of each caption."""
        return self._feature["cap_feats"].bytes_list.value

    def with_caches(self, **caches: bytes | Sequence[bytes]) -> bytes:
        """Returns the bytes of this record with these cached features."""
        example = tf_example_pb2.Example()
        example.CopyFrom(self._example)
        for name, value in caches.items():
            values = [value] if isinstance(value, bytes) else value
            example.features.feature[name].bytes_list.value[:] = values
        return example.SerializeToString(deterministic=True)

    def with_captions(self, captions: Sequence[Caption]) -> bytes:
        """Returns the bytes of this record with other captions, and without features of the old."""
        example = tf_example_pb2.Example()
        example.CopyFrom(self._example)
        feature = example.features.feature
        feature.pop("cap_feats", None)
        for name in Caption._fields:
            values = [getattr(caption, name).encode() for caption in captions]
            feature[f"captions/{name}"].bytes_list.value[:] = values
        return example.SerializeToString(deterministic=True)


def serialize(
    *, id: str, source: str, image: bytes, captions: Iterable[Caption], size: tuple[int, int]
) -> bytes:
    """Returns a record's bytes; `size` is the original's width and height."""
    example = tf_example_pb2.Example()
    feature = example.features.feature
    texts = {"id": [id], "source": [source]}
    for name in Caption._fields:
        texts[f"captions/{name}"] = [getattr(caption, name) for caption in captions]
    for name, values in texts.items():
        feature[name].bytes_list.value.extend(value.encode() for value in values)
    feature["image"].bytes_list.value.append(image)
    for name, value in zip(("width", "height"), size, strict=True):
        feature[name].int64_list.value.append(value)
    return example.SerializeToString(deterministic=True)  # the same record, the same bytes


@dataclasses.dataclass(frozen=True)
class CaptionSet:
    """The records of a split that have captions of the same kinds and languages."""

    pairs: tuple[tuple[str, str], ...]  # (kind, language)
    num_records: int
    example: str  # the id of one of them


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records in the directory of the dataset."""

    name: str
    num_records: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Split:
    """The records of a bucket."""

    bucket: Bucket
    shards: tuple[Shard, ...]
    caption_sets: tuple[CaptionSet, ...]

    @property
    def name(self) -> str:
        return f"train_{self.bucket}"

    @property
    def num_records(self) -> int:
        return sum(shard.num_records for shard in self.shards)


def shard_name(bucket: Bucket, index: int, count: int) -> str:
    """Returns the file name that TFDS expects of a shard."""
    return f"pictures-train_{bucket}.array_record-{index:05d}-of-{count:05d}"


@dataclasses.dataclass(frozen=True)
class LatentsCache:
    """Latents of the stored pictures: bfloat16 [height / downscale, width / downscale, channels].

    A picture that could not be decoded has no bytes, so that it is replaced when it is met, as it
    would be without a cache.
    """

    fingerprint: str  # of the autoencoder
    downscale: int
    channels: int

    def decode(self, content: bytes, bucket: Bucket) -> BFloat16[np.ndarray, "h w C"]:
        height, width = bucket.height // self.downscale, bucket.width // self.downscale
        return np.frombuffer(content, bfloat16).reshape(height, width, self.channels)


@dataclasses.dataclass(frozen=True)
class CapFeatsCache:
    """Features of each caption, in the order of the captions: bfloat16 [num_tokens, feature_dim].

    Only slots with a token are stored; they are the first of the `max_tokens` of a batch.
    """

    fingerprint: str  # of the text encoder
    system_prompt: str  # the name of what stood before each caption
    max_tokens: int
    feature_dim: int
    num_truncated: int  # captions that were cut to `max_tokens`
    empty: str  # base64 of the features of "", which stands for a dropped caption

    @classmethod
    def with_empty(cls, empty: BFloat16[np.ndarray, "n F"], **settings: Any) -> "CapFeatsCache":
        return cls(empty=base64.b64encode(empty.tobytes()).decode(), **settings)

    def decode(self, content: bytes | None) -> BFloat16[np.ndarray, "n F"]:
        """The features of a caption, given their bytes; those of "" without."""
        content = base64.b64decode(self.empty) if content is None else content
        return np.frombuffer(content, bfloat16).reshape(-1, self.feature_dim)

    def check(self, record: "Record") -> None:
        """Raises Rejected unless each caption of a record has features, of one token or more."""
        sizes, row = [len(content) for content in record.cap_feats], 2 * self.feature_dim
        if len(sizes) != len(record.captions) or any(s < row or s % row for s in sizes):
            raise Rejected(DAMAGED, "its cap_feats are not those of its captions")


CACHES = {"latents": LatentsCache, "cap_feats": CapFeatsCache}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a dataset directory holds.

    Its fingerprint changes with any byte of a picture or a caption, and with what made the caches.
    """

    splits: tuple[Split, ...]
    settings: Mapping[str, Any]
    license: str
    attribution: str
    fingerprint: str
    version: str = __version__  # of the code that wrote it
    cache: Mapping[str, LatentsCache | CapFeatsCache] = dataclasses.field(default_factory=dict)

    @property
    def source(self) -> str:
        return self.settings["source"]

    @property
    def resolution(self) -> int:
        return self.settings["resolution"]

    @property
    def pixels_per_token(self) -> int:
        return self.settings["pixels_per_token"]

    @property
    def num_records(self) -> int:
        return sum(split.num_records for split in self.splits)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted({kind for kind, _ in self._pairs()}))

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(sorted({language for _, language in self._pairs()}))

    def _pairs(self) -> Iterator[tuple[str, str]]:
        for split in self.splits:
            for caption_set in split.caption_sets:
                yield from caption_set.pairs

    def save(self, directory: epath.PathLike) -> None:
        """Writes aside and renames, so that a manifest is whole or absent."""
        content = {
            "format": FORMAT,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "license": self.license,
            "attribution": self.attribution,
            "settings": dict(self.settings),
            "num_records": self.num_records,
            "kinds": self.kinds,
            "languages": self.languages,
            "splits": [
                {
                    "name": split.name,
                    "width": split.bucket.width,
                    "height": split.bucket.height,
                    "num_records": split.num_records,
                    "caption_sets": [
                        {
                            "captions": [f"{kind}/{language}" for kind, language in c.pairs],
                            "num_records": c.num_records,
                            "example": c.example,
                        }
                        for c in split.caption_sets
                    ],
                    "shards": [dataclasses.astuple(shard) for shard in split.shards],
                }
                for split in self.splits
            ],
            "cache": {
                name: {"dtype": "bfloat16", **dataclasses.asdict(cache)}
                for name, cache in self.cache.items()
            },
        }
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        files.write(epath.Path(directory) / MANIFEST, text)

    @classmethod
    def load(cls, directory: epath.PathLike) -> "Manifest":
        path = epath.Path(directory) / MANIFEST
        try:
            content = read_json(path, REMAKE)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{directory} is not a finished dataset: it has no {MANIFEST}. Make one with "
                f"tools/prepare_data.py --output={directory}; its --help shows how."
                f"{_elsewhere(directory)}"
            ) from None
        try:
            found, version = content["format"], content["version"]
            if found == FORMAT:
                return cls._from_json(content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error!r}). {REMAKE}") from error
        raise InputError(
            f"{path} has format {found}, written by lumina_jax {version}; this is {__version__}, "
            f"which reads format {FORMAT}. {REMAKE}"
        )

    @classmethod
    def _from_json(cls, content: Mapping[str, Any]) -> "Manifest":
        """Takes nothing on trust: it may come from others, and names files."""
        names = ("license", "attribution", "fingerprint", "version")
        settings, splits = content["settings"], tuple(map(_split, content["splits"]))
        text(settings["source"])
        for name in ("resolution", "pixels_per_token"):
            whole(settings[name], 1, _MAX_SIDE)
        cache = {name: _cache(name, made, splits) for name, made in content["cache"].items()}
        given = {name: text(content[name]) for name in names}
        return cls(splits=splits, settings=settings, cache=cache, **given)


def _split(content: Mapping[str, Any]) -> Split:
    width, height = (whole(content[side], 1, _MAX_SIDE) for side in ("width", "height"))
    whole(width * height, 1, MAX_PIXELS)
    return Split(
        bucket=Bucket(width, height),
        shards=tuple(_shard(*shard) for shard in content["shards"]),
        caption_sets=tuple(
            CaptionSet(
                pairs=tuple(_pair(pair) for pair in c["captions"]),
                num_records=whole(c["num_records"], 0, _MAX_RECORDS),
                example=text(c["example"]),
            )
            for c in content["caption_sets"]
        ),
    )


def _shard(name: Any, num_records: Any, num_bytes: Any) -> Shard:
    if not _SHARD_NAME.fullmatch(text(name)):
        raise ValueError(f"{name!r:.200} is not the name of a shard")
    return Shard(name, whole(num_records, 0, _MAX_RECORDS), whole(num_bytes, 0, _MAX_BYTES))


def _pair(pair: Any) -> tuple[str, str]:
    kind, language = text(pair).split("/", 1)
    return kind, language


def _cache(name: str, made: Mapping, splits: Sequence[Split]) -> LatentsCache | CapFeatsCache:
    cache = CACHES[name](**{key: value for key, value in made.items() if key != "dtype"})
    text(cache.fingerprint)
    if isinstance(cache, LatentsCache):
        whole(cache.downscale, 1, _MAX_SIDE)
        whole(cache.channels, 1, MAX_WIDTH)
        for split in splits:
            width, height = split.bucket.width, split.bucket.height
            whole(width * height // cache.downscale**2 * cache.channels, 0, _MAX_FEATURES)
    else:
        text(cache.system_prompt)
        whole(cache.num_truncated, 0, _MAX_BYTES)
        row = 2 * whole(cache.feature_dim, 1, MAX_WIDTH)
        whole(whole(cache.max_tokens, 1, MAX_WIDTH) * cache.feature_dim, 1, _MAX_FEATURES)
        num_bytes = len(base64.b64decode(text(cache.empty), validate=True))
        if num_bytes < row or num_bytes % row:
            raise ValueError(f"{num_bytes} bytes of features of the empty text")
    return cache


def _elsewhere(directory: epath.PathLike) -> str:
    """Where datasets are, if below this directory: one for each resolution."""
    directory = epath.Path(directory)
    below = files.sizes(directory) if directory.is_dir() else {}
    found = [
        str(directory / name) for name in sorted(below) if (directory / name / MANIFEST).exists()
    ]
    return f" Or choose one of these: {', '.join(found)}." if found else ""


def num_tokens(resolution: int, pixels_per_token: int) -> int:
    """Returns the token budget of a resolution: that of its square picture."""
    if resolution < 1 or pixels_per_token < 1 or resolution % pixels_per_token:
        raise InputError(
            f"Resolution {resolution} is not a multiple of {pixels_per_token} pixels per token."
        )
    return (resolution // pixels_per_token) ** 2


@contextlib.contextmanager
def shard_writer(path: epath.PathLike) -> Iterator[Callable[[bytes], None]]:
    """Yields a function that appends a record; the file has its name when all are in it."""
    with files.aside(path) as aside:
        # Pictures do not shrink when they are compressed once more.
        writer = ArrayRecordWriter(str(aside), "group_size:1,uncompressed")
        try:
            yield writer.write
        finally:
            writer.close()


def read_shard(path: epath.PathLike, rows: Sequence[int]) -> Iterator[bytes]:
    """Yields some records of a shard, in the order of the rows, a few in memory at a time."""
    reader = _open_reader(os.fspath(path))
    try:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            yield from reader.read(list(rows[start : start + _ROWS_AT_ONCE]))
    finally:
        reader.close()


class Records:
    """The bytes of a split's records, by index; threads may share it.

    Files are opened when they are needed, and stay open.
    """

    def __init__(self, directory: epath.PathLike, split: Split):
        # There may be thousands of shards, and a file that was read stays open.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        paths = [os.fspath(epath.Path(directory) / shard.name) for shard in split.shards]
        self.remote = bool(paths) and files.is_remote(paths[0])
        self._paths = _readable(paths)
        self._ends = list(itertools.accumulate(shard.num_records for shard in split.shards))
        self._readers: list[ArrayRecordReader | None] = [None] * len(paths)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        return self.read([index])[0]

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """Returns these records; those of a bucket are fetched in parallel.

        Raises Rejected where one is damaged, and what ArrayRecord raises where it cannot be read.
        """
        by_shard: dict[int, list[int]] = {}
        for row, index in enumerate(indices):
            by_shard.setdefault(bisect.bisect_right(self._ends, index), []).append(row)
        contents: list[bytes] = [b""] * len(indices)

        def read(shard: int) -> None:
            rows, first = by_shard[shard], self._ends[shard - 1] if shard else 0
            reader, places = self._reader(shard), [indices[row] - first for row in rows]
            try:
                # In one call they come over the network together; from a disk faster alone.
                found = (
                    reader.read(places) if self.remote else [reader.read([p])[0] for p in places]
                )
            except RuntimeError as error:
                if "orrupted" in str(error):  # of ArrayRecord: a checksum does not fit
                    raise Rejected(DAMAGED, str(error)) from error
                raise
            for row, content in zip(rows, found, strict=True):
                contents[row] = content

        # Waiting for a bucket is most of a read; a local file is in memory or soon is.
        run = _downloads().map if self.remote and len(by_shard) > 1 else map
        collections.deque(run(read, by_shard), maxlen=0)
        return contents

    def shard_of(self, index: int) -> str:
        """Returns the path of the file that a record is in."""
        return self._paths[bisect.bisect_right(self._ends, index)]

    def _reader(self, shard: int) -> ArrayRecordReader:
        # Without a lock: opening waits for the store, and a second reader does no harm.
        reader = self._readers[shard]
        if reader is None:
            reader = self._readers[shard] = _open_reader(self._paths[shard])
        return reader


def _open_reader(path: str) -> ArrayRecordReader:
    # Rows are read at random: what follows one is not wanted.
    return ArrayRecordReader(path, "readahead_buffer_size:0")


@functools.cache
def _downloads() -> futures.ThreadPoolExecutor:
    return futures.ThreadPoolExecutor(64, thread_name_prefix="download")


def _readable(paths: list[str]) -> list[str]:
    """Paths that ArrayRecord can open: local ones and gs:// as they are, copies of others."""
    if not paths or not files.is_remote(paths[0]) or paths[0].startswith("gs://"):
        return paths
    folder = pathlib.Path(tempfile.gettempdir()) / "lumina_jax_shards"
    logging.info(
        "Copying %d shards to %s: ArrayRecord reads local files and gs://.", len(paths), folder
    )
    return fsspec.open_local(
        [f"filecache::{path}" for path in paths], filecache={"cache_storage": str(folder)}
    )


def check_complete(directory: epath.PathLike, splits: Iterable[Split]) -> None:
    """Raises unless every shard is there in full; one listing, whatever their number."""
    splits = list(splits)
    sizes = files.sizes(directory)
    num_shards = sum(len(split.shards) for split in splits)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if not files.is_remote(directory) and most < num_shards + 200:
        raise InputError(
            f"{directory} has {num_shards} shards, and this process may open {most} files. Raise "
            "the limit (ulimit -Hn), or prepare the data with a larger --shard_mb."
        )
    faults = []
    for shard in (shard for split in splits for shard in split.shards):
        if shard.name not in sizes:
            faults.append(shard.name)
        elif sizes[shard.name] != shard.num_bytes:
            lacking = f"{sizes[shard.name]:,} of {shard.num_bytes:,} bytes"
            faults.append(f"{shard.name} as it was written (it has {lacking})")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise InputError(
            f"{directory} lacks {', '.join(faults[:5])}{more}. Copy it again in full. {REMAKE}"
        )


def find(directory: epath.PathLike) -> Manifest | None:
    """Returns the manifest of a finished dataset, None where nothing is yet."""
    directory = epath.Path(directory)
    if not directory.exists() or (directory.is_dir() and not files.sizes(directory)):
        return None
    if not directory.is_dir() or not (directory / MANIFEST).exists():
        raise InputError(
            f"{directory} holds files but no {MANIFEST}: an unfinished dataset, or something else. "
            "Choose another directory, or replace an unfinished dataset with --overwrite."
        )
    return Manifest.load(directory)


def remove(directory: epath.PathLike) -> None:
    """Removes a dataset, finished or not, and nothing else that may lie beside it."""
    directory = epath.Path(directory)
    if not directory.exists():
        return
    names = files.sizes(directory) if directory.is_dir() else {directory.name: 0}
    shards = sorted(name for name in names if name.lstrip(".").startswith("pictures-train_"))
    # The manifest goes first: a directory half removed must not look complete.
    ours = [*(name for name in (MANIFEST, *_TFDS_FILES) if name in names), *shards]
    begun = any((directory / UNFINISHED / marker).exists() for marker in MARKERS)
    finished = files.is_json_with(directory / MANIFEST, ("format", "fingerprint", "splits"))
    if names and not (shards or begun or finished):
        raise InputError(
            f"{directory} is not a dataset (it has no {MANIFEST} and no shards), so --overwrite "
            "does not touch it. Choose another directory."
        )
    for name in ours:
        (directory / name).unlink()


def check_store(output: epath.PathLike) -> None:
    """Refuses a store that shards cannot be read from again."""
    if files.is_remote(output) and not os.fspath(output).startswith("gs://"):
        raise InputError(
            f"Output {os.fspath(output)}: ArrayRecord does not read that store. Give a local "
            "directory or gs://, and copy the data set from there."
        )


def begin_copy(
    source: epath.PathLike,
    output: epath.PathLike,
    manifest: Manifest,
    fingerprint: str,
    *,
    change: str,
    overwrite: bool,
) -> Manifest | None:
    """Leaves `unfinished/` as a copy may find it: with its own work, or with its mark alone.

    Args:
        source: the dataset to copy.
        output: the directory of the copy.
        manifest: of the source.
        fingerprint: that the copy will have.
        change: what else may differ where a copy has another one, for the message.
        overwrite: whether to remove another dataset at `output`.

    Returns:
        The manifest of the copy where it is finished, else None.
    """
    output = epath.Path(output)
    unfinished = output / UNFINISHED
    began = unfinished / MARKERS[1]
    if not began.exists() and files.sizes(unfinished):
        raise InputError(
            f"{unfinished} is not of this command. Choose another output, or remove it yourself."
        )
    finished = None
    if overwrite:
        begun = began.exists()
        remove(output)
        if begun:
            files.remove_folder(unfinished, last=MARKERS[1])
    elif began.exists() or (finished := find(output)) is not None:
        there = began.read_text() if finished is None else finished.fingerprint
        if there != fingerprint:
            raise InputError(
                f"{output} holds another data set, or {change}. Choose another directory, or "
                "replace it with --overwrite."
            )
    if finished is None:
        check_complete(source, manifest.splits)
        files.write(began, fingerprint)
    return finished


def finish(directory: epath.PathLike, manifest: Manifest) -> None:
    """Adds what TFDS needs to read the shards, and the manifest, which says that all is there."""
    files.remove_asides(directory)
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    filenames = tfds.core.ShardedFileTemplate(
        epath.Path(directory), template, "pictures", filetype_suffix="array_record"
    )
    splits = [
        tfds.core.SplitInfo(
            name=split.name,
            shard_lengths=[shard.num_records for shard in split.shards],
            num_bytes=sum(shard.num_bytes for shard in split.shards),
            filename_template=filenames,
        )
        for split in manifest.splits
        if split.shards  # TFDS refuses a split without records; the manifest still lists it
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints what it is doing
        tfds.folder_dataset.write_metadata(
            data_dir=os.fspath(directory),
            features=features(manifest.cache),
            split_infos=splits,
            filename_template=filenames,
            check_data=False,  # would need TensorFlow
            description="Captioned pictures, resized into buckets.",
            license=manifest.license,
        )
    manifest.save(directory)


def features(cached: Collection[str] = ()) -> tfds.features.FeaturesDict:
    """Returns the TFDS features of a record; the image stays in the bytes it was encoded to.

    Cached features are bytes too: as tensors of varying shape TFDS would store them by values and
    row lengths, and rebuild those of every caption for the one that is wanted.
    """
    content = tfds.features.Tensor(shape=(), dtype=np.object_)
    caches = {"latents": content, "cap_feats": tfds.features.Sequence(content)}
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "source": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "captions": tfds.features.Sequence(
                {
                    "text": tfds.features.Text(),
                    "kind": tfds.features.Text(),
                    "language": tfds.features.Text(),
                }
            ),
            # Of the original: the bucket says how large the stored picture is.
            "height": np.int32,
            "width": np.int32,
            **{name: caches[name] for name in cached},
        }
    )
