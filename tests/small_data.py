"""Small data sets for tests, made as `tools/prepare_data.py` makes large ones."""

import dataclasses
import os
import pathlib
import socket
from collections.abc import Collection, Iterator, Sequence

from etils import epath
from PIL import Image

from lumina_jax import files
from lumina_jax.data import caption_table, prepare, records
from lumina_jax.data.buckets import Bucket
from lumina_jax.data.caption_table import PartIndex, Piece, Row, Table, Written
from lumina_jax.data.captions import Caption
from lumina_jax.data.records import Manifest, Record
from lumina_jax.data.sources.base import Item, Part
from lumina_jax.data.sources.openmoji import OpenMojiSource
from lumina_jax.unicap.report import Counts


@dataclasses.dataclass(frozen=True)
class ListSource:
    """Pictures that are in memory, so many in a part."""

    items: tuple[Item, ...]
    part_size: int = 100
    name: str = "list"
    license: str = "CC0"
    attribution: str = "by nobody"

    def settings(self) -> dict:
        return {}

    def parts(self) -> Sequence[Part]:
        starts = range(0, len(self.items), self.part_size)
        return [Part("memory", start, start + self.part_size) for start in starts]

    def read(self, part: Part) -> Iterator[Item]:
        yield from self.items[part.start : part.stop]


def picture(id: str, size: tuple[int, int] = (40, 40), captions: Sequence[Caption] = ()) -> Item:
    """A picture whose colour follows from its id, with a caption if none is given."""
    colour = tuple((37 * ord(id[0]) + 91 * channel + 7 * len(id)) % 256 for channel in range(3))
    captions = tuple(captions) or (Caption(f"caption of {id}", "short", "en"),)
    return Item(id, Image.new("RGB", size, colour), captions)


def make_dataset(
    directory: os.PathLike | str,
    items: Sequence[Item],
    buckets: Sequence[Bucket] = (Bucket(32, 32),),
    *,
    resolution: int = 32,
    part_size: int = 100,
    overwrite: bool = False,
    **settings,
) -> Manifest:
    """Prepares pictures of a list, with 4 pixels per token."""
    targets = prepare.make_targets(directory, [resolution], 4, buckets)
    prepare.prepare(
        ListSource(tuple(items), part_size),
        directory,
        targets,
        prepare.Settings(**settings),
        overwrite=overwrite,
    )
    return Manifest.load(directory)


def make_emojis(
    directory: os.PathLike | str, emojis: str, buckets: Sequence[Bucket] = (Bucket(32, 32),)
) -> Manifest:
    """Prepares drawings of OpenMoji at 32 px."""
    targets = prepare.make_targets(directory, [32], 4, buckets)
    source = OpenMojiSource(emojis, resolution=32)
    prepare.prepare(source, directory, targets, prepare.Settings(fit="pad"))
    return Manifest.load(directory)


def caption_row(id: str, *captions: Caption) -> Row:
    """A row of a table of captions; without any, the picture has a long one that names it."""
    captions = captions or (Caption(f"{id}, told at length", "long", "en"),)
    return Row(id, tuple(Written(*caption, "a model", "1", 0) for caption in captions))


def make_caption_table(directory: os.PathLike | str, *pieces: Sequence[Row]) -> Table:
    """Writes a table of these pieces, two to a part, as `tools/caption.py` does."""
    files.write(epath.Path(directory) / caption_table.SETTINGS, '{"model": "a model"}')
    for part in range(0, len(pieces), 2):
        index, counts = PartIndex(), Counts()
        for number, rows in enumerate(pieces[part : part + 2]):
            caption_table.write_rows(directory, Piece(part // 2, number), rows)
            index.add(rows)
            for row in rows:
                counts.add(row)
        index.save(directory, part // 2, counts)
    caption_table.finish(directory, Counts())
    return Table.load(directory)


def damage(directory: os.PathLike | str, ids: Collection[str]) -> None:
    """Cuts the stored pictures of these records short, as a disk or a copy might."""
    manifest = Manifest.load(directory)
    splits = []
    for split in manifest.splits:
        shards = []
        for shard in split.shards:
            path = pathlib.Path(directory) / shard.name
            found = [Record(c) for c in records.read_shard(path, range(shard.num_records))]
            with records.shard_writer(path) as write:
                for record in found:
                    image = record.image
                    write(
                        records.serialize(
                            id=record.id,
                            source=record.source,
                            image=image[: len(image) // 2] if record.id in ids else image,
                            captions=record.captions,
                            size=record.size,
                        )
                    )
            shards.append(dataclasses.replace(shard, num_bytes=path.stat().st_size))
        splits.append(dataclasses.replace(split, shards=tuple(shards)))
    dataclasses.replace(manifest, splits=tuple(splits)).save(directory)


def free_address() -> str:
    """host:port on this machine, where nobody listens now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"
