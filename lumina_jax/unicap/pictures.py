"""Which pictures are captioned: those of a source, or some of it; described, to be opened again."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lumina_jax.data.sources import make_source
from lumina_jax.data.sources.base import AroundSource, Item, Part, Source
from lumina_jax.data.sources.metadata import is_picture
from lumina_jax.data.sources.openmoji import OpenMojiSource
from lumina_jax.errors import InputError
from lumina_jax.untrusted import text, whole


@dataclasses.dataclass(frozen=True)
class Pilot(AroundSource):
    """A few pictures of a source, from parts at even distances: a source too.

    Args:
        source: of the pictures.
        num_pictures: at most.
        num_parts: that they come from, at most.
    """

    source: Source
    num_pictures: int
    num_parts: int = 8

    def settings(self) -> dict[str, Any]:
        return self.source.settings() | {"pilot": self.num_pictures}

    def parts(self) -> Sequence[Part]:
        """One, so that the models have work all the time, as they have in a long run."""
        digest = hashlib.sha256(repr(self._chosen).encode()).hexdigest()
        return [Part("pilot", 0, self.num_pictures, (digest,))]

    @functools.cached_property
    def _chosen(self) -> list[Part]:
        every = self.source.parts()
        count = min(self.num_parts, len(every), self.num_pictures)
        return [every[i * len(every) // count] for i in range(count)]

    def read(self, part: Part) -> Iterator[Item]:
        del part
        count = len(self._chosen)
        for number, chosen in enumerate(self._chosen):
            share = self.num_pictures // count + (number < self.num_pictures % count)
            yield from itertools.islice(self.source.read(chosen), share)


def expected_pictures(source: Source, part: Part) -> int | None:
    """Returns how many pictures a part will give, for a progress bar; None where nobody knows."""
    if isinstance(source, Pilot):
        return source.num_pictures
    if source.name == "folder":
        return sum(map(is_picture, part.names))
    if source.name == "openmoji":
        return len(part.names)
    return part.stop - part.start if source.name == "tfds" and part.stop else None


def describe_source(source: Source) -> dict[str, Any]:
    """Returns what `open_source` needs to open a source again, as JSON knows it."""
    options = dict(source.settings())
    return {"kind": source.name, "path": options.pop("path", ""), "options": options}


def open_source(
    source: Mapping[str, Any], path: str | None = None, resolution: int = 512
) -> Source:
    """Returns the source that the settings of a table name, with the same parts.

    Args:
        source: its kind, path and options.
        path: where it is now, if elsewhere than it was.
        resolution: of drawings, in pixels; it is no setting of a table.
    """
    try:
        kind, was, options = text(source["kind"]), text(source["path"]), dict(source["options"])
        pilot = whole(options.pop("pilot", 0), 0, 2**32)
        if kind == "openmoji":
            describe = options.get("describe") is True
            opened = OpenMojiSource(text(options["emojis"]), resolution, describe)
        else:
            tuples = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
            # Else a picture that had no caption before would have no picture either.
            tuples["needs_captions"] = False
            opened = make_source(kind, path or was, **tuples)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"The settings of the table do not say what it was made of ({error!r})."
        ) from error
    return Pilot(opened, pilot) if pilot else opened
