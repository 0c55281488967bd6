"""Which pictures are kept, and that each record is the one that was planned, at each resolution."""

import dataclasses
import io

import numpy as np
from PIL import Image

from lumina_jax.data import prepare
from lumina_jax.data.buckets import Bucket, resize_and_crop
from lumina_jax.data.images import Rejected
from lumina_jax.data.prepare import Target
from lumina_jax.data.records import Manifest, Record, Records
from lumina_jax.data.sources.base import Item
from tests.small_data import ListSource, picture

# The buckets of 32 px are not those of 64 px in the same order: a number is not a shape.
BUCKETS = {
    32: (Bucket(32, 32), Bucket(40, 24)),
    64: (Bucket(80, 48), Bucket(64, 64)),
}


def noise(id: str, size: tuple[int, int] = (64, 64)) -> Item:
    """A picture whose pixels follow from its id."""
    pixels = np.random.default_rng(list(id.encode())).integers(0, 256, (size[1], size[0], 3))
    return dataclasses.replace(picture(id), image=Image.fromarray(pixels.astype(np.uint8)))


def prepared(directory, items, *resolutions: int, part_size: int = 100) -> prepare.Report:
    targets = [
        Target(str(directory / str(resolution)), resolution, 4, BUCKETS[resolution])
        for resolution in resolutions
    ]
    return prepare.prepare(ListSource(tuple(items), part_size), directory, targets)


def stored(directory) -> dict[Bucket, list[Record]]:
    return {
        split.bucket: [Record(c) for c in Records(directory, split).read(range(split.num_records))]
        for split in Manifest.load(directory).splits
    }


def test_pictures_that_one_resolution_rejects_leave_the_others_where_they_are(tmp_path):
    sizes = {
        "square": (64, 64),
        "small square": (40, 40),  # to be enlarged 1.6 times for 64 px
        "wide": (80, 48),
        "small wide": (50, 30),
        "tiny": (16, 16),  # too small for 32 px too
    }
    names = [*sizes] * 4  # in parts of four: each begins with another one
    items = [noise(f"{name} {n}", sizes[name]) for n, name in enumerate(names)]
    items.insert(6, Item("broken", None, fault=Rejected("truncated")))
    report = prepared(tmp_path, items, 32, 64, part_size=4)

    small = sum(name.startswith("small") for name in names)
    tiny = names.count("tiny")
    assert report.rejected == (
        {"too small": tiny, "truncated": 1},
        {"too small": tiny + small, "truncated": 1},
    )
    for resolution, excluded in ((32, ("tiny", "broken")), (64, ("tiny", "broken", "small"))):
        for bucket, records in stored(tmp_path / str(resolution)).items():
            shape = "wide" if bucket.width > bucket.height else "square"
            wanted = [i for i in items if shape in i.id and not i.id.startswith(excluded)]
            assert [record.id for record in records] == [item.id for item in wanted]
            for item, record in zip(wanted, records, strict=True):
                pixels = np.asarray(Image.open(io.BytesIO(record.image)))
                np.testing.assert_array_equal(pixels, resize_and_crop(item.image, bucket))


def test_each_resolution_has_the_fingerprint_that_it_has_alone(tmp_path):
    items = [noise(id) for id in "abc"]
    prepared(tmp_path / "both", items, 32, 64)
    found = [Manifest.load(tmp_path / "both" / str(r)).fingerprint for r in (32, 64)]
    assert found[0] != found[1]
    for resolution, fingerprint in zip((32, 64), found, strict=True):
        prepared(tmp_path / "alone", items, resolution)
        assert Manifest.load(tmp_path / "alone" / str(resolution)).fingerprint == fingerprint


def test_a_duplicate_that_is_dropped_does_not_take_its_id_along(tmp_path):
    first, other = noise("first"), noise("other")
    duplicate = dataclasses.replace(first, id="other")
    for part_size in (100, 1):
        directory = tmp_path / str(part_size)
        report = prepared(directory, [first, duplicate, other], 32, part_size=part_size)
        assert report.rejected == ({"duplicate": 1},)
        kept = stored(directory / "32")[Bucket(32, 32)]
        assert [record.id for record in kept] == ["first", "other"]
        pixels = np.asarray(Image.open(io.BytesIO(kept[1].image)))
        np.testing.assert_array_equal(pixels, resize_and_crop(other.image, Bucket(32, 32)))
