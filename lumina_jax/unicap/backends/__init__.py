"""Models that write captions, as descriptions that can be sent to another process and opened there.

A module of a kind of model is imported when one is opened: torch is not needed to ask a server.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

from lumina_jax.unicap.backends.base import Backend
from lumina_jax.unicap.backends.pair import Pair

Opener = Callable[[], Backend]


@functools.lru_cache(4)
def opened(open_backend: Opener) -> Backend:
    """Returns the model of a description; equal ones are opened once in a process."""
    return open_backend()


@dataclasses.dataclass(frozen=True)
class Local:
    """A model of transformers in this process; see `local.LocalBackend`."""

    path: str
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 8
    max_pixels: int = 1_003_520
    name: str = ""

    def __call__(self) -> Backend:
        from lumina_jax.unicap.backends.local import LocalBackend

        return LocalBackend(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Servers:
    """A model behind servers; see `server.ServerBackend`.

    The key is named, not given: descriptions are written to files and logs.
    """

    urls: tuple[str, ...]
    model: str = ""
    key_variable: str = ""
    concurrency: int = 64
    timeout: float = 300.0
    patience: float = 600.0
    requests_per_minute: float = 0.0
    extra: str = "{}"  # JSON

    def __call__(self) -> Backend:
        from lumina_jax.unicap.backends.server import ServerBackend, read_key

        given: dict[str, Any] = dataclasses.asdict(self)
        api_key = read_key(given.pop("key_variable"))
        extra = json.loads(given.pop("extra"))
        return ServerBackend(given.pop("urls"), **given, api_key=api_key, extra=extra)


@dataclasses.dataclass(frozen=True)
class Two:
    """One model for what is about pictures, another for what is about text alone."""

    look: Opener
    write: Opener

    def __call__(self) -> Backend:
        return Pair(opened(self.look), opened(self.write))
