import dataclasses
import io
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from lumina_jax.data import openmoji, records
from lumina_jax.data.buckets import Bucket, pad_to_fit
from lumina_jax.data.captions import Caption
from lumina_jax.errors import InputError
from lumina_jax.version import __version__

CAPTIONS = (Caption("a", "short", "en"),)
BUCKETS = (Bucket(16, 16), Bucket(20, 12))


def picture(name: str, size=(40, 40), captions=CAPTIONS) -> records.Picture:
    rng = np.random.default_rng(len(name))
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    return records.Picture(name, image, captions)


def recipe(**changes) -> records.Recipe:
    settings = {
        "source": "noise",
        "buckets": BUCKETS,
        "resolution": 16,
        "pixels_per_token": 4,
        "license": "CC0",
        "attribution": "by nobody",
    }
    return records.Recipe(**(settings | changes))


@pytest.fixture
def small(tmp_path):
    directory = tmp_path / "small"
    records.build(directory, recipe(), [picture("a"), picture("bb", (80, 48))])
    return directory


def test_a_record_comes_back_as_it_was_written(dataset):
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


def test_the_manifest_counts_what_is_in_the_shards(dataset):
    manifest = records.Manifest.load(dataset)
    splits = tfds.builder_from_directory(dataset).info.splits
    assert {split.name: split.num_records for split in manifest.splits} == {
        name: info.num_examples for name, info in splits.items()
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
    manifest = records.Manifest.load(dataset)
    manifest.save(tmp_path)
    assert records.Manifest.load(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_pictures_go_to_their_buckets_and_empty_buckets_are_listed(tmp_path):
    pictures = [picture("a"), picture("b"), picture("c", (10, 10))]
    manifest = records.build(tmp_path / "d", recipe(), pictures)
    assert {str(s.bucket): s.num_records for s in manifest.splits} == {"16x16": 3, "20x12": 0}


def test_small_pictures_are_lossless_and_large_ones_are_jpeg():
    image = picture("a").image
    assert Image.open(io.BytesIO(records.encode(image, 128))).format == "PNG"
    assert Image.open(io.BytesIO(records.encode(image, 256))).format == "JPEG"


def test_the_fingerprint_follows_the_content(tmp_path, small):
    same = records.build(tmp_path / "same", recipe(), [picture("a"), picture("bb", (80, 48))])
    caption = picture("bb", (80, 48), (Caption("b", "short", "en"),))
    other = records.build(tmp_path / "other", recipe(), [picture("a"), caption])
    assert records.Manifest.load(small).fingerprint == same.fingerprint != other.fingerprint


def test_a_finished_dataset_is_left_as_it_is(small):
    def explode():
        raise AssertionError("a picture was asked for")
        yield

    assert records.build(small, recipe(), explode()) == records.Manifest.load(small)


def test_a_dataset_of_other_settings_is_not_replaced_unless_asked(small):
    other = recipe(buckets=BUCKETS[:1], options={"emojis": "all"})
    with pytest.raises(
        InputError,
        match=r"buckets is \['16x16', '20x12'\] there and \['16x16'\] here; emojis is None there",
    ):
        records.build(small, other, [picture("c")])
    manifest = records.build(small, other, [picture("c")], overwrite=True)
    assert records.Manifest.load(small) == manifest
    assert manifest.num_records == 1
    assert not list(small.glob("*20x12*"))


def test_a_build_that_fails_leaves_nothing_and_keeps_what_was_there(small, tmp_path):
    before = records.Manifest.load(small)

    def stop():
        yield picture("c")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.build(tmp_path / "new", recipe(), stop())
    with pytest.raises(KeyboardInterrupt):
        records.build(small, recipe(), stop(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert records.Manifest.load(small) == before


def test_no_picture_at_all_is_refused(tmp_path):
    with pytest.raises(InputError, match="noise gave no picture"):
        records.build(tmp_path / "d", recipe(), [])


def test_what_is_no_dataset_is_never_removed(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match=r"holds files but no manifest\.json"):
        records.build(tmp_path, recipe(), [picture("a")])
    with pytest.raises(InputError, match="so --overwrite does not remove it"):
        records.build(tmp_path, recipe(), [picture("a")], overwrite=True)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_an_unfinished_dataset_can_be_replaced(small):
    (small / "manifest.json").unlink()
    with pytest.raises(InputError, match="an unfinished dataset, or something else"):
        records.build(small, recipe(), [picture("a")])
    assert records.build(small, recipe(), [picture("a")], overwrite=True).num_records == 1


def test_a_directory_without_a_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match=r"no manifest.json. Make one with tools/prepare_data"):
        records.Manifest.load(tmp_path / "nothing")


def test_a_damaged_manifest_is_refused(small, tmp_path):
    path = small / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        records.Manifest.load(small)
    path.write_text(json.dumps({k: v for k, v in content.items() if k != "splits"}))
    with pytest.raises(InputError, match=r"is damaged \(KeyError\('splits'\)\)"):
        records.Manifest.load(small)
    path.write_text(json.dumps(content | {"cache": {"latents": {"fingerprint": "pixels"}}}))
    with pytest.raises(InputError, match=r"is damaged .*missing .*'downscale'"):
        records.Manifest.load(small)
    path.write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(InputError, match=r"has format 99, .* reads format 1"):
        records.Manifest.load(small)


def test_a_manifest_from_before_there_were_caches_can_be_read(small):
    path, manifest = small / "manifest.json", records.Manifest.load(small)
    content = json.loads(path.read_text())
    assert content.pop("cache") == {}
    path.write_text(json.dumps(content))
    assert records.Manifest.load(small) == manifest


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
    manifest = dataclasses.replace(records.Manifest.load(small), cache=cache)
    manifest.save(tmp_path)
    found = records.Manifest.load(tmp_path)
    assert found == manifest
    np.testing.assert_array_equal(found.cache["cap_feats"].decode(None), empty)
    np.testing.assert_array_equal(found.cache["cap_feats"].decode(empty[:1].tobytes()), empty[:1])
    latents = np.ones((2, 4, 16), jnp.bfloat16)  # of a picture 32 wide and 16 high
    decoded = found.cache["latents"].decode(latents.tobytes(), Bucket(32, 16))
    np.testing.assert_array_equal(decoded, latents)


def test_a_dataset_can_be_moved(dataset, tmp_path):
    moved = shutil.copytree(dataset, tmp_path / "elsewhere")
    assert len(tfds.builder_from_directory(moved).as_data_source("train_32x32")) > 0
