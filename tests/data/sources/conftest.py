"""A place for raw data, on the disk and in memory: what is read from one is read from the other."""

import dataclasses
import io
import uuid
from collections.abc import Callable, Sequence

import fsspec
import pytest
from PIL import Image

from lumina_jax.data.sources.base import Item, Source


@dataclasses.dataclass(frozen=True)
class Store:
    path: str

    def put(self, files: dict[str, bytes | str]) -> str:
        """Writes files by their names, and returns the folder."""
        for name, content in files.items():
            with fsspec.open(f"{self.path}/{name}", "wb", auto_mkdir=True) as file:
                file.write(content.encode() if isinstance(content, str) else content)
        return self.path


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path) -> Store:
    """A folder on the disk, or one that has a URL."""
    if request.param == "local":
        return Store(str(tmp_path / "raw"))
    return Store(f"memory://{uuid.uuid4().hex}/raw")


def _png(red: int = 0) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 3), (red, 0, 0)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="session")
def png() -> Callable[..., bytes]:
    """A small picture; another for each number."""
    return _png


@pytest.fixture(scope="session")
def read_all() -> Callable[[Source], list[Item]]:
    """Every item of a source, part by part, after checking that reading again changes nothing."""

    def read_all(source: Source) -> list[Item]:
        parts: Sequence = source.parts()
        assert source.parts() == parts
        items = [list(source.read(part)) for part in parts]
        # The last part first: what a part gives does not depend on the others.
        again = [list(source.read(part)) for part in reversed(parts)][::-1]
        assert [[str(item) for item in part] for part in again] == [
            [str(item) for item in part] for part in items
        ]
        return [item for part in items for item in part]

    return read_all
