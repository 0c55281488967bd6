"""The pictures of a source with captions of tables, which are found by the ids of the pictures."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from lumina_jax.data.caption_table import Merge
from lumina_jax.data.sources.base import AroundSource, Item, Part, Source


@dataclasses.dataclass(frozen=True)
class WithTable(AroundSource):
    """A source whose captions lie elsewhere.

    Args:
        source: of the pictures; one that does not need captions.
        merge: the tables, and whether the source's own captions stay.
    """

    source: Source
    merge: Merge

    def settings(self) -> dict[str, Any]:
        return {**self.source.settings(), **self.merge.settings()}

    def parts(self) -> Sequence[Part]:
        return self.source.parts()

    def read(self, part: Part) -> Iterator[Item]:
        """One after another: a table keeps the pieces that it has read, a picture is large."""
        for item in self.source.read(part):
            if item.fault is None:
                (captions,) = self.merge.captions([item.id], [item.captions])
                if captions:
                    item = dataclasses.replace(item, captions=captions)
                else:
                    item = Item(item.id, None, fault=self.merge.missing())
            yield item
