"""A folder of pictures with captions beside them: `x.jpg` with `x.txt`, `x.json` or both.

What follows the picture's name may say the kind and the language of the captions: `x.tags.txt`,
`x.zh.txt`, `x.tags.zh.txt`. Each line of a text file is a caption, as in OneTrainer and
SimpleTuner, and `.caption` is read like `.txt`, for folders made for kohya's scripts. A caption of
several lines needs JSON.

Every file is accounted for, except hidden ones: captions without a picture and files that are
neither are items with a fault.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

from lumina_jax.data.images import Rejected
from lumina_jax.data.sources.base import Item, Part
from lumina_jax.data.sources.metadata import (
    PICTURE_SUFFIXES,
    CaptionedSource,
    faulty,
    is_picture,
    make_item,
)
from lumina_jax.data.sources.reading import (
    names_below,
    open_filesystem,
    read_from,
    url_of,
)
from lumina_jax.errors import InputError

GROUPS_PER_PART = 1000  # pictures with their captions
# Of the desktop, as hidden as those whose names begin with a dot.
_HIDDEN = ("Thumbs.db", "desktop.ini")


@dataclasses.dataclass(frozen=True)
class FolderSource(CaptionedSource):
    """Pictures anywhere below a folder. The id of one is its path in the folder."""

    name: ClassVar[str] = "folder"

    def parts(self) -> list[Part]:
        fs, root = open_filesystem(self.path)
        if not fs.isdir(root):
            raise InputError(f"{self.path} is not a folder. Give the folder that holds pictures.")
        names = [n for n in names_below(fs, root) if n.rpartition("/")[2] not in _HIDDEN]
        if not any(map(is_picture, names)):
            raise InputError(
                f"{self.path} holds no picture among {len(names):,} files. Pictures are "
                f"{', '.join(PICTURE_SUFFIXES)}: give another folder, or convert them."
            )
        groups = self._groups(names)
        return [
            Part(
                url_of(fs, root),
                names=tuple(n for group in groups[i : i + GROUPS_PER_PART] for n in group),
            )
            for i in range(0, len(groups), GROUPS_PER_PART)
        ]

    def read(self, part: Part) -> Iterator[Item]:
        fs, root = open_filesystem(part.path)

        def content(name: str) -> bytes:
            return read_from(fs, f"{root.rstrip('/')}/{name}")

        for group in self._groups(part.names):
            pictures = [name for name in group if is_picture(name)]
            if not pictures:
                (name,) = group
                if any(self._stems(name)):
                    yield faulty(name, Rejected("no picture", "a caption without its picture"))
                else:
                    detail = "not a file of a known suffix"  # links to folders are none either
                    yield faulty(name, Rejected("not a picture", detail))
                continue
            stem = pictures[0].rpartition(".")[0]
            beside = [name for name in group if not is_picture(name)]
            for name in pictures:
                try:
                    files = [(other[len(stem) + 1 :].lower(), content(other)) for other in beside]
                    captions, metadata = self.read_beside(files, split_lines=True)
                    item = make_item(name, content(name), captions, metadata)
                except Rejected as fault:
                    item = faulty(name, fault)
                yield item

    def _groups(self, names: Sequence[str]) -> list[list[str]]:
        """Returns the pictures of each name with the captions beside them; what is alone is too."""
        stems = {name.rpartition(".")[0] for name in names if is_picture(name)}
        groups: dict[tuple[str, bool], list[str]] = {}
        for name in names:
            owners = (stem for stem in self._stems(name) if stem in stems)
            owner = next(owners, None)
            groups.setdefault((owner or name, owner is None), []).append(name)
        return list(groups.values())

    def _stems(self, name: str) -> Iterator[str]:
        """Yields the pictures that a file may belong to, by their paths without suffix.

        The longest first: `a.zh.txt` goes with `a.zh.jpg`, and with `a.jpg` if there is none.
        """
        folder, slash, base = name.rpartition("/")
        pieces = base.split(".")
        for i in range(len(pieces) - 1, 0, -1):
            suffix = ".".join(pieces[i:]).lower()
            if suffix in PICTURE_SUFFIXES or suffix == "json" or self.text_file(suffix):
                yield folder + slash + ".".join(pieces[:i])
