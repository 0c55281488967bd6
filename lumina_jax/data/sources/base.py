"""What every source of raw pictures looks like.

A source is cut into parts. A part is one task: any process can read it, any number of times, and
gets the same items in the same order. Nothing is left out in silence: what cannot be taken is an
item too, with the fault that the source found.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from lumina_jax.data.captions import Caption
from lumina_jax.data.images import Rejected


@dataclasses.dataclass(frozen=True)
class Part:
    """One task of reading. `dataclasses.asdict` of it can be written as JSON.

    Args:
        path: the file or folder it is read from, a local path or any URL that fsspec knows.
        start: the first of what its source counts: bytes, rows, row groups.
        stop: one past the last; None for all that follow.
        names: of the files, where the part is a list of them.
    """

    path: str
    start: int = 0
    stop: int | None = None
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Item:
    """What a source gives for one picture.

    Args:
        id: unique in the data set, the same in every run.
        image: its encoded bytes, or the picture; None where there is a fault instead.
        captions: in the order in which they were given.
        scores: the numbers given beside it, by name, for filters.
        fault: why it cannot be taken, when the source itself knows.
    """

    id: str
    image: bytes | Image.Image | None
    captions: tuple[Caption, ...] = ()
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    fault: Rejected | None = None


@runtime_checkable
class Source(Protocol):
    """A frozen dataclass that is sent to worker processes.

    Attributes:
        name: the kind of source, as the command line has it.
        license: of the pictures, for the manifest; "" when it was not given.
        attribution: what has to be said with them.
    """

    name: str
    license: str
    attribution: str

    def settings(self) -> dict[str, Any]:
        """What must be equal for a data set to be used again; it can be written as JSON."""
        ...

    def parts(self) -> Sequence[Part]:
        """The tasks, in an order that is the same in every run."""
        ...

    def read(self, part: Part) -> Iterator[Item]:
        """Every picture of the part, good or bad, each once, in an order that is the same."""
        ...


class AroundSource:
    """What a source that is made of another one, its `source`, says of itself."""

    source: Source

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def license(self) -> str:
        return self.source.license

    @property
    def attribution(self) -> str:
        return self.source.attribution
