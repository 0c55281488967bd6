"""Writing files so that a name never stands for half a file."""

import io
import uuid

from etils import epath
from PIL import Image


def write(path: epath.PathLike, content: bytes | str) -> None:
    """Writes aside, then renames; the folder is made. Any filesystem that epath knows."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    aside.replace(path)


def write_png(path: epath.PathLike, image: Image.Image) -> None:
    png = io.BytesIO()
    image.save(png, "PNG")
    write(path, png.getvalue())
