"""Parquet files with a column of pictures: their bytes, or paths and URLs of their files.

Bytes are plain, or the {"bytes", "path"} that Hugging Face writes. Only the columns that are needed
are read, a few rows at a time.
"""

import dataclasses
import importlib
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from lumina_jax.data.images import Rejected
from lumina_jax.data.sources.base import Item, Part
from lumina_jax.data.sources.metadata import CaptionedSource, faulty, make_item
from lumina_jax.data.sources.reading import join, list_files, open_filesystem, read_file
from lumina_jax.errors import InputError

IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "image_bytes", "bytes", "image_path", "path", "url")
ROWS_PER_PART = 1000  # or more, where a row group has more
ROWS_AT_ONCE = 16
_BUFFER = 2**22  # bytes read at a time from each column
_NUM_FOOTERS = 32  # read at the same time, since a store answers each after tens of milliseconds


@dataclasses.dataclass(frozen=True)
class ParquetSource(CaptionedSource):
    """Pictures in Parquet files. The id of one is `<file>:<row>`.

    Args:
        image: the column of the pictures; by default the first of IMAGE_COLUMNS that is there.
        root: where paths that are not absolute start; by default the folder of their file.
    """

    image: str = ""
    root: str = ""

    name: ClassVar[str] = "parquet"

    def parts(self) -> list[Part]:
        """The row groups, small ones together."""
        files = list_files(self.path, (".parquet",))
        _pyarrow()  # a missing package is told once, not by each thread
        with ThreadPoolExecutor(_NUM_FOOTERS) as pool:
            groups = list(pool.map(self._row_groups, [path for path, _ in files]))
        parts = [
            Part(path, start, stop, (name,))
            for (path, name), found in zip(files, groups, strict=True)
            for start, stop in found
        ]
        if not parts:
            raise InputError(f"{self.path} holds no row. Give files that do.")
        return parts

    def read(self, part: Part) -> Iterator[Item]:
        pyarrow = _pyarrow()
        fs, file = open_filesystem(part.path)
        root = self.root or part.path.rpartition("/")[0]
        # Without a cache: columns are read in turns, and each turn would discard what was cached.
        with fs.open(file, "rb", cache_type="none") as stream:
            watched = _Watched(stream)
            table = _open(watched, part.path)
            image, columns = self._columns(table.schema_arrow, part.path)
            row = sum(table.metadata.row_group(i).num_rows for i in range(part.start))
            for group in range(part.start, part.stop):
                end = row + table.metadata.row_group(group).num_rows
                batches = table.iter_batches(
                    ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False
                )
                try:
                    for batch in batches:
                        for i in range(len(batch)):
                            name = f"{part.names[0]}:{row}"
                            yield self._item(name, batch.slice(i, 1), image, root)
                            row += 1
                except (pyarrow.ArrowException, OSError) as error:
                    if watched.failed:
                        raise
                    fault = Rejected("damaged row group", f"{part.path}: {error}")
                for lost in range(row, end):
                    yield faulty(f"{part.names[0]}:{lost}", fault)
                row = end

    def _item(self, name: str, row: Any, image: str, root: str) -> Item:
        try:
            (metadata,) = row.to_pylist()
            content = metadata[image]
            if isinstance(content, dict):  # as Hugging Face writes it
                content = content.get("bytes") or content.get("path")
            if not content:
                raise Rejected("no picture", f"column {image} is empty")
            captions = self.captions_of(metadata)
            if isinstance(content, str):
                content = read_file(join(root, content))
            return make_item(name, content, captions, metadata)
        except UnicodeDecodeError as error:  # pyarrow looks at texts when they are taken out
            return faulty(name, Rejected("bad caption", str(error)))
        except Rejected as fault:
            return faulty(name, fault)

    def _row_groups(self, path: str) -> list[tuple[int, int]]:
        """Returns neighbours that make a part together, after checking the columns."""
        fs, file = open_filesystem(path)
        with fs.open(file, "rb", cache_type="none") as stream:
            table = _open(stream, path)
            self._columns(table.schema_arrow, path)
            counts = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        parts, start = [], 0
        for stop in range(1, len(counts) + 1):
            # Some writers make groups of a hundred rows, and a part has its own files.
            num_rows = sum(counts[start:stop])
            if num_rows >= ROWS_PER_PART or (stop == len(counts) and num_rows):
                parts.append((start, stop))
                start = stop
        return parts

    def _columns(self, schema: Any, path: str) -> tuple[str, list[str]]:
        """Returns the column of the pictures, and all that are needed."""
        types = _pyarrow().types
        columns = {field.name: field.type for field in schema}
        image = self.image or next((name for name in IMAGE_COLUMNS if name in columns), "image")
        captions = self.caption_keys(columns)
        wanted = [given.partition(":")[0] for given in self.captions]
        missing = [name for name in (image, *wanted) if name not in columns]
        if missing or (self.needs_captions and not captions):
            raise InputError(
                f"{path} has no column {', '.join(missing) or 'of captions'}; it has "
                f"{', '.join(columns)}. Name the columns: image=... and captions=key:kind:language."
            )
        if not _holds_pictures(columns[image], types):
            raise InputError(
                f"{path}: column {image} is {columns[image]}; pictures are bytes, paths, or the "
                "bytes and path of Hugging Face. Name another column: image=..."
            )
        scores = [n for n, t in columns.items() if types.is_integer(t) or types.is_floating(t)]
        return image, list(dict.fromkeys([image, *captions, *scores]))


def _holds_pictures(column: Any, types: types.ModuleType) -> bool:
    if types.is_struct(column):
        return column.get_field_index("bytes") >= 0 or column.get_field_index("path") >= 0
    tests = ("binary", "large_binary", "binary_view", "string", "large_string", "string_view")
    return any(getattr(types, f"is_{test}")(column) for test in tests)


class _Watched:
    """A file that remembers whether its store failed: pyarrow tells that like damaged content."""

    def __init__(self, file: Any):
        self._file, self.failed = file, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except Exception:
            self.failed = True
            raise


def _open(stream: Any, path: str) -> Any:
    pyarrow = _pyarrow()
    try:
        # Buffered, a column is read piece by piece; else the whole of a row group at once.
        return pyarrow.parquet.ParquetFile(stream, buffer_size=_BUFFER, pre_buffer=False)
    except pyarrow.ArrowException as error:
        raise InputError(
            f"{path} is not a whole Parquet file: {error} Copy it again, or leave it out."
        ) from error


def _pyarrow() -> types.ModuleType:
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise InputError(
            f"Parquet needs the package 'pyarrow' ({error}). Install it: "
            "pip install 'lumina-jax[prepare]'"
        ) from error
