"""Paths on disks and in buckets; files written so that a name never stands for half of one."""

import contextlib
import io
import json
import os
import pathlib
import re
import tempfile
import uuid
from collections.abc import Collection, Iterator, Sequence

import fsspec
from etils import epath
from PIL import Image

# Else fsspec, and epath with it, believes for ever in the first list of a folder of a bucket: what
# other processes and TensorStore write there would not be seen.
for _store in ("gcs", "s3", "az"):
    fsspec.config.conf.setdefault(_store, {}).setdefault("use_listings_cache", False)


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is in a bucket or another store, not on a disk of this machine."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path, whatever the current directory is; that of a bucket is one already.

    epath's own `absolute()` takes `gs://bucket` for a folder of the current directory.
    """
    path = epath.Path(path)
    return path if is_remote(path) else path.absolute()


def put(local: pathlib.Path, path: epath.PathLike) -> None:
    """Copies a file to a bucket, where it is seen whole or not at all."""
    fs, name = fsspec.core.url_to_fs(os.fspath(path))
    fs.put_file(str(local), name)


@contextlib.contextmanager
def aside(path: epath.PathLike) -> Iterator[pathlib.Path]:
    """Yields a local path to write to; what is there then becomes the file, unless it raises.

    On a bucket the file is put in one piece, which shows it whole or not at all.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remote = is_remote(path)
    with contextlib.ExitStack() as stack:
        if remote:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = pathlib.Path(path.parent)  # a rename does not cross file systems
        local = folder / f".{path.name}.{uuid.uuid4().hex}"
        stack.callback(local.unlink, missing_ok=True)
        yield local
        if remote:
            put(local, path)
        else:
            local.replace(path)


def sizes(folder: epath.PathLike) -> dict[str, int]:
    """The bytes of each file in a folder, by one listing; none where there is no folder."""
    fs, root = fsspec.core.url_to_fs(os.fspath(folder))
    try:
        found = fs.ls(root, detail=True)
    except FileNotFoundError:  # a bucket has no empty folders
        return {}
    return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in found}


def is_json_with(path: epath.PathLike, keys: Collection[str]) -> bool:
    """Whether a file is a JSON object with these keys; others have files of that name too."""
    try:
        return set(keys) <= set(json.loads(epath.Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return False


def remove_asides(folder: epath.PathLike, of: tuple[str, ...] = ("",)) -> None:
    """Removes what killed writers left; nobody may be writing to the folder any more.

    Args:
        folder: to look in.
        of: how the names begin of the files that were to be written.
    """
    asides = [name for name in sizes(folder) if re.fullmatch(r"\..+\.[0-9a-f]{32}", name)]
    remove_names(folder, [name for name in asides if name[1:].startswith(of)])


def remove_names(folder: epath.PathLike, names: Sequence[str]) -> None:
    """Removes files of a folder, a thousand with a request."""
    fs, root = fsspec.core.url_to_fs(os.fspath(folder))
    for start in range(0, len(names), 1000):
        fs.rm([f"{root}/{name}" for name in names[start : start + 1000]])


def move(path: epath.PathLike, target: epath.PathLike) -> None:
    """Gives a file another name, in place of what has it. A bucket makes a copy first."""
    path = epath.Path(path)
    if is_remote(path):
        path.copy(target, overwrite=True)
        path.unlink()
    else:
        path.replace(target)


def remove_folder(folder: epath.PathLike, last: str) -> None:
    """Removes a folder of files; the one called `last` says whose they are, so it goes last."""
    remove_names(folder, [name for name in sizes(folder) if name != last])
    epath.Path(folder).rmtree(missing_ok=True)


def write(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a whole file; the folder is made."""
    with aside(path) as local:
        local.write_bytes(content.encode() if isinstance(content, str) else content)


def write_png(path: epath.PathLike, image: Image.Image) -> None:
    png = io.BytesIO()
    image.save(png, "PNG")
    write(path, png.getvalue())
