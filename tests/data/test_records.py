"""What is on the disk: records, shards, the manifest."""

import dataclasses
import io
import json
import pathlib
import shutil

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from lumina_jax.data import records
from lumina_jax.data.buckets import Bucket, pad_to_fit
from lumina_jax.data.captions import Caption
from lumina_jax.data.images import Rejected
from lumina_jax.data.records import Manifest, Record, Records
from lumina_jax.data.sources import openmoji
from lumina_jax.errors import InputError
from lumina_jax.version import __version__
from tests.small_data import make_dataset, picture


@pytest.fixture
def small(tmp_path):
    make_dataset(tmp_path / "small", [picture("a"), picture("bb", (80, 48))])
    return tmp_path / "small"


def serialize(**changes) -> bytes:
    given = {
        "id": "a/b.jpg",
        "source": "folder",
        "image": b"\x89PNG",
        "captions": [Caption("eine Katze", "long", "de"), Caption("猫", "tags", "zh")],
        "size": (640, 480),
    }
    return records.serialize(**(given | changes))


def test_a_record_survives_its_bytes():
    record = Record(serialize())
    assert (record.id, record.source, record.image) == ("a/b.jpg", "folder", b"\x89PNG")
    assert record.captions == (Caption("eine Katze", "long", "de"), Caption("猫", "tags", "zh"))
    assert record.size == (640, 480)
    assert Record(serialize(captions=[])).captions == ()
    assert serialize() == serialize()


def test_cached_features_are_added_to_what_a_record_has():
    content = Record(serialize()).with_caches(latents=b"12", cap_feats=[b"3", b""])
    record = Record(content)
    assert (record.latents, list(record.cap_feats)) == (b"12", [b"3", b""])
    assert Record(record.with_caches(latents=b"4")).latents == b"4"
    assert (record.image, record.captions) == (b"\x89PNG", Record(serialize()).captions)


def test_any_tfds_tool_can_read_a_dataset(dataset):
    (dog,) = openmoji.pictures("🐶", resolution=32)
    builder = tfds.builder_from_directory(dataset)
    source = builder.as_data_source("train_32x32", decoders={"image": tfds.decode.SkipDecoding()})
    (record,) = [record for record in source if record["id"] == b"1F436"]
    stored = np.asarray(Image.open(io.BytesIO(record["image"])))
    np.testing.assert_array_equal(stored, pad_to_fit(dog.image, Bucket(32, 32)))
    assert (record["width"], record["height"]) == dog.image.size
    assert record["source"] == b"openmoji"
    captions = record["captions"]
    assert [
        Caption(*(text.decode() for text in texts))
        for texts in zip(captions["text"], captions["kind"], captions["language"], strict=True)
    ] == list(dog.captions)


def test_tfds_decodes_the_picture_that_we_decode(small):
    (record,) = tfds.builder_from_directory(small).as_data_source("train_32x32[:1]")
    assert record["image"].shape == (32, 32, 3)
    assert record["image"].dtype == np.uint8


def test_the_manifest_counts_what_is_in_the_shards(dataset):
    manifest = Manifest.load(dataset)
    splits = tfds.builder_from_directory(dataset).info.splits
    assert {split.name: split.num_records for split in manifest.splits} == {
        name: info.num_examples for name, info in splits.items()
    }
    assert {shard.name: shard.num_bytes for s in manifest.splits for shard in s.shards} == {
        path.name: path.stat().st_size for path in dataset.glob("pictures-*")
    }
    assert manifest.num_records == 24
    assert manifest.resolution == 32
    assert manifest.pixels_per_token == 4
    assert manifest.source == "openmoji"
    assert manifest.kinds == ("short",)
    assert manifest.languages == openmoji.LANGUAGES
    assert manifest.version == __version__
    assert "CC BY-SA 4.0" in manifest.attribution


def test_a_manifest_survives_saving_and_loading(dataset, tmp_path):
    manifest = Manifest.load(dataset)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_directory_without_a_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match=r"no manifest.json. Make one with tools/prepare_data"):
        Manifest.load(tmp_path / "nothing")


def test_a_directory_of_datasets_names_those_that_are_in_it(small):
    with pytest.raises(InputError, match=rf"Or choose one of these: {small}\."):
        Manifest.load(small.parent)


def test_a_damaged_manifest_is_refused(small):
    path = small / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        Manifest.load(small)
    path.write_text(json.dumps({k: v for k, v in content.items() if k != "splits"}))
    with pytest.raises(InputError, match=r"is damaged \(KeyError\('splits'\)\)"):
        Manifest.load(small)
    path.write_text(json.dumps(content | {"cache": {"latents": {"fingerprint": "pixels"}}}))
    with pytest.raises(InputError, match=r"is damaged .*missing .*'downscale'"):
        Manifest.load(small)
    path.write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(InputError, match=r"has format 99, .* reads format 2"):
        Manifest.load(small)


def test_a_manifest_with_caches_survives_saving_and_loading(small, tmp_path):
    empty = np.arange(6, dtype=jnp.bfloat16).reshape(2, 3)
    cap_feats = records.CapFeatsCache.with_empty(
        empty,
        fingerprint="use",
        system_prompt="base",
        max_tokens=8,
        feature_dim=3,
        num_truncated=1,
    )
    cache = {"latents": records.LatentsCache("vae", 8, 16), "cap_feats": cap_feats}
    manifest = dataclasses.replace(Manifest.load(small), cache=cache)
    manifest.save(tmp_path)
    found = Manifest.load(tmp_path)
    assert found == manifest
    np.testing.assert_array_equal(found.cache["cap_feats"].decode(None), empty)
    np.testing.assert_array_equal(found.cache["cap_feats"].decode(empty[:1].tobytes()), empty[:1])
    latents = np.ones((2, 4, 16), jnp.bfloat16)  # of a picture 32 wide and 16 high
    decoded = found.cache["latents"].decode(latents.tobytes(), Bucket(32, 16))
    np.testing.assert_array_equal(decoded, latents)


def test_records_of_many_shards_are_read_in_the_order_asked_for(tmp_path):
    items = [picture("x" * n) for n in range(1, 13)]
    manifest = make_dataset(tmp_path / "d", items, shard_bytes=500)
    split = manifest.splits[0]
    assert len(split.shards) > 3
    stored = Records(tmp_path / "d", split)
    assert [Record(stored[i]).id for i in range(len(stored))] == [item.id for item in items]
    order = [7, 0, 11, 3, 7, 2]
    assert [Record(c).id for c in stored.read(order)] == [items[i].id for i in order]


def test_shards_of_a_store_that_is_not_read_directly_are_copied(small, tmp_path, monkeypatch):
    monkeypatch.setattr(records.tempfile, "gettempdir", lambda: str(tmp_path))
    names = [shard.name for split in Manifest.load(small).splits for shard in split.shards]
    paths = [f"memory://data/{name}" for name in names]
    fs = fsspec.filesystem("memory")
    for name in names:
        fs.pipe_file(f"/data/{name}", (small / name).read_bytes())
    copies = records._readable(paths)
    assert [pathlib.Path(p).read_bytes() for p in copies] == [
        (small / name).read_bytes() for name in names
    ]
    assert records._readable([str(small / names[0])]) == [str(small / names[0])]
    assert records._readable(["gs://bucket/shard"]) == ["gs://bucket/shard"]


def test_a_shard_that_is_not_finished_has_no_name(tmp_path):
    def fail():
        with records.shard_writer(tmp_path / "shard") as write:
            write(b"x")
            assert len(list(tmp_path.iterdir())) == 1
            raise RuntimeError("out of power")

    with pytest.raises(RuntimeError, match="out of power"):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_dataset_can_be_moved(dataset, tmp_path):
    moved = shutil.copytree(dataset, tmp_path / "elsewhere")
    assert len(tfds.builder_from_directory(moved).as_data_source("train_32x32")) > 0
    records.check_complete(moved, Manifest.load(moved).splits)


def test_only_what_a_dataset_is_made_of_is_removed(small):
    (small / "letter.txt").write_text("dear")
    records.remove(small)
    assert {path.name for path in small.iterdir()} == {"letter.txt", "report.json"}
    with pytest.raises(InputError, match=r"is not a dataset .* so --overwrite does not touch it"):
        records.remove(small)


def changed(directory: pathlib.Path, **changes) -> None:
    """Changes the first shard, split or settings that the manifest names."""
    path = directory / "manifest.json"
    content = json.loads(path.read_text())
    for place, value in changes.items():
        target = {
            "name": content["splits"][0]["shards"][0],
            "num_records": content["splits"][0]["shards"][0],
        }.get(place, content["splits"][0])
        if isinstance(target, list):
            target[("name", "num_records").index(place)] = value
        else:
            target[place] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "pictures-train_1x1.array_record-00000-of-00001/../x", ""]
)
def test_a_manifest_names_no_file_outside_its_directory(small, name):
    changed(small, name=name)
    with pytest.raises(InputError, match=r"is damaged .*is not the name of a shard"):
        Manifest.load(small)


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 10**9}, {"width": -32}, {"width": "32"}, {"width": 32.5}, {"width": True},
        {"width": 60_000, "height": 60_000}, {"num_records": -1}, {"num_records": 10**30},
        {"num_records": None}, {"caption_sets": [{"captions": ["x"]}]}, {"shards": {"a": 1}},
    ],
)  # fmt: skip
def test_a_manifest_of_absurd_numbers_is_refused_before_anything_is_made_of_them(small, changes):
    changed(small, **changes)
    with pytest.raises(InputError, match="is damaged"):
        Manifest.load(small)


def test_a_manifest_of_endless_depth_or_length_is_refused(small):
    path = small / "manifest.json"
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match="is damaged"):
        Manifest.load(small)
    with path.open("wb") as file:  # a hole: it takes no room on the disk
        file.truncate(2**40)
    with pytest.raises(InputError, match="has more than 33,554,432 bytes"):
        Manifest.load(small)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        Manifest.load(small)
    with pytest.raises(InputError, match="cannot be read"):  # found by fuzzing
        Manifest.load("1" * 5000)


def test_what_is_no_record_is_rejected_with_the_reason():
    def with_features(**values):
        example = tfds.proto.tf_example_pb2.Example.FromString(serialize())
        for name, value in values.items():
            example.features.feature[name.replace("__", "/")].bytes_list.value[:] = value
        return example.SerializeToString()

    for content, reason in (
        (b"\xff", "Error parsing"),
        (b"", "0 values of id"),
        (with_features(id=[b"a", b"b"]), "2 values of id"),
        (with_features(id=[b"\xff"]), "can't decode"),
        (with_features(captions__text=[b"one"]), "zip"),
        (with_features(captions__kind=[b"tall", b"tags"]), "a caption of kind 'tall'"),
        (serialize(size=(0, 480)), r"width \[0\]"),
    ):
        with pytest.raises(Rejected, match=reason):
            Record(content)


def test_features_that_are_not_those_of_the_captions_are_rejected():
    cache = records.CapFeatsCache("use", "base", 8, 3, 0, "")
    record = Record(serialize())  # of two captions
    good = Record(record.with_caches(cap_feats=[bytes(6), bytes(12)]))
    cache.check(good)
    for odd in ([bytes(6)], [bytes(6), bytes(7)], [bytes(6), b""], []):
        with pytest.raises(Rejected, match="not those of its captions"):
            cache.check(Record(record.with_caches(cap_feats=odd)))
