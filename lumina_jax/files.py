"""Writing files so that a name never stands for half a file."""

import contextlib
import io
import os
import pathlib
import re
import tempfile
import uuid
from collections.abc import Iterator

import fsspec
from etils import epath
from PIL import Image


@contextlib.contextmanager
def aside(path: epath.PathLike) -> Iterator[pathlib.Path]:
    """Yields a local path to write to; what is there then becomes the file, unless it raises.

    On a bucket the file is put in one piece, which shows it whole or not at all.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remote = "://" in os.fspath(path)
    with contextlib.ExitStack() as stack:
        if remote:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = pathlib.Path(path.parent)  # a rename does not cross file systems
        local = folder / f".{path.name}.{uuid.uuid4().hex}"
        stack.callback(local.unlink, missing_ok=True)
        yield local
        if remote:
            fs, name = fsspec.core.url_to_fs(os.fspath(path))
            fs.put_file(str(local), name)
        else:
            local.replace(path)


def remove_asides(folder: epath.PathLike) -> None:
    """Removes what killed writers left; nobody may be writing to the folder any more."""
    for path in epath.Path(folder).iterdir():
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", path.name):
            path.unlink()


def write(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a whole file; the folder is made."""
    with aside(path) as local:
        local.write_bytes(content.encode() if isinstance(content, str) else content)


def write_png(path: epath.PathLike, image: Image.Image) -> None:
    png = io.BytesIO()
    image.save(png, "PNG")
    write(path, png.getvalue())
