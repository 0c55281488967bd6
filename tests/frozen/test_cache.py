"""Cached features are the encoder's own, rounded, and a run from them sees the same data."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina_jax import sharding
from lumina_jax.data import images
from lumina_jax.data.captions import CaptionPolicy
from lumina_jax.data.loader import Dataset, Loader
from lumina_jax.data.records import Manifest, Record, Records
from lumina_jax.data.sources import openmoji
from lumina_jax.errors import InputError
from lumina_jax.frozen import cache
from lumina_jax.frozen.autoencoder import Pixels
from lumina_jax.frozen.text_encoder import make_text_encoder
from lumina_jax.frozen.use import UniversalSentenceEncoder
from lumina_jax.system_prompts import SYSTEM_PROMPTS
from tests.small_data import damage, make_emojis

ROUNDING = {"rtol": 2**-8, "atol": 1e-5}  # of bfloat16, and of the sums on another mesh
ROOT = pathlib.Path(__file__).parents[2]
BOTH = ("latents", "cap_feats")


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(replica=1, data=2, model=1, devices=jax.devices()[:2])


@pytest.fixture(scope="module")
def text_encoder():
    return make_text_encoder("use", max_tokens=32)


@pytest.fixture(scope="module")
def make(mesh, text_encoder):
    """Caches the features of a data set; keywords change how."""

    def make(source, output, features=BOTH, **changes):
        settings = {
            "text_encoder": text_encoder,
            "autoencoder": Pixels(),
            "system_prompt": "base",
            "mesh": mesh,
            "batch_size": 32,
        }
        return cache.cache_features(source, output, features, **(settings | changes))

    return make


@pytest.fixture(scope="module")
def cached(dataset, make, tmp_path_factory):
    """The shared data set with both features. Read it."""
    directory = tmp_path_factory.mktemp("cached") / "emojis"
    make(dataset, directory)
    return directory


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Four pictures, one of them cut short in the middle of its bytes."""
    directory = tmp_path_factory.mktemp("few") / "emojis"
    make_emojis(directory, "🐶🐱🍎🍋")
    damage(directory, {"1F436"})
    return directory


def stored(directory):
    """{id: (bucket, record)} of a data set."""
    return {
        record.id: (split.bucket, record)
        for split in Manifest.load(directory).splits
        for record in map(Record, Records(directory, split).read(range(split.num_records)))
    }


@pytest.fixture(scope="module")
def encode(text_encoder):
    """Captions -> features and mask, on one device, as a run without a cache has them."""
    mesh = sharding.make_mesh(replica=1, data=1, model=1, devices=jax.devices()[:1])
    params, run = text_encoder.load_params(mesh), jax.jit(text_encoder.encode)

    def encode(captions):
        ids, mask = text_encoder.tokenize(captions)
        return np.asarray(run(params, ids, mask)), mask

    return encode


def test_every_record_has_the_features_of_its_own_picture_and_captions(dataset, cached, encode):
    manifest, before, after = Manifest.load(cached), stored(dataset), stored(cached)
    assert list(after) == list(before)  # in the same order, so that a run sees the same rows
    for record_id, (bucket, record) in after.items():
        _, original = before[record_id]
        assert record.image == original.image
        assert record.captions == original.captions
        image = np.empty((bucket.height, bucket.width, 3), np.uint8)
        images.decode_stored(record.image, image)
        latents = manifest.cache["latents"].decode(record.latents, bucket)
        np.testing.assert_allclose(latents.astype(np.float32), image / 127.5 - 1, **ROUNDING)

    bucket, record = after["1F436"]
    texts = [SYSTEM_PROMPTS["base"] + c.text for c in record.captions]
    for content, features, mask in zip(record.cap_feats, *encode(texts), strict=True):
        found = manifest.cache["cap_feats"].decode(content)
        assert len(found) == mask.sum() < 32
        np.testing.assert_allclose(found.astype(np.float32), features[mask], **ROUNDING)


def test_a_batch_from_the_cache_is_the_batch_of_a_run_without_one(
    dataset, cached, text_encoder, encode
):
    def load(directory, features):
        return Loader(
            [Dataset(str(directory))],
            batch_size=8,
            seed=3,
            tokenize=text_encoder.tokenize,
            policy=CaptionPolicy(dropout=0.3, system_prompt="base"),
            features=features,
        )

    plain, quick = load(dataset, ()), load(cached, BOTH)
    assert "" in {text for step in range(6) for text in plain.batch_at(step)["captions"]}
    for step in range(6):
        expected, found = plain.batch_at(step), quick.batch_at(step)
        assert set(found) == {"latents", "cap_feats", "token_mask", "ids", "captions"}
        assert found["latents"].dtype == found["cap_feats"].dtype == jnp.bfloat16
        assert found["captions"] == expected["captions"]
        np.testing.assert_array_equal(found["ids"], expected["ids"])
        np.testing.assert_array_equal(found["token_mask"], expected["token_mask"])
        latents = found["latents"].astype(np.float32)
        np.testing.assert_allclose(latents, expected["images"] / 127.5 - 1, **ROUNDING)
        features, _ = encode(expected["captions"])
        np.testing.assert_allclose(found["cap_feats"].astype(np.float32), features, **ROUNDING)


@pytest.mark.parametrize(
    ("name", "absent"), [("latents", {"images", "cap_feats"}), ("cap_feats", {"latents"})]
)
def test_one_of_the_two_features_can_be_read_alone(cached, text_encoder, name, absent):
    loader = Loader(
        [Dataset(str(cached))],
        batch_size=4,
        seed=0,
        tokenize=text_encoder.tokenize,
        features=(name,),
    )
    batch = loader.batch_at(0)
    assert name in batch
    assert not absent & set(batch)


def test_latents_are_read_without_decoding_the_picture(cached, text_encoder, monkeypatch):
    monkeypatch.delattr("lumina_jax.data.images.decode_stored")
    loader = Loader(
        [Dataset(str(cached))], batch_size=4, seed=0, tokenize=text_encoder.tokenize, features=BOTH
    )
    assert loader.batch_at(0)["latents"].shape[0] == 4


def test_the_manifest_says_what_made_the_features(dataset, cached, text_encoder):
    before, manifest = Manifest.load(dataset), Manifest.load(cached)
    assert before.cache == {}
    for ours, theirs in zip(manifest.splits, before.splits, strict=True):
        assert (ours.bucket, ours.caption_sets) == (theirs.bucket, theirs.caption_sets)
        assert ours.num_records == theirs.num_records
    assert manifest.fingerprint != before.fingerprint
    latents, cap_feats = manifest.cache["latents"], manifest.cache["cap_feats"]
    assert (latents.fingerprint, latents.downscale, latents.channels) == ("pixels", 1, 3)
    assert cap_feats.fingerprint == text_encoder.fingerprint()
    assert (cap_feats.system_prompt, cap_feats.max_tokens) == ("base", 32)
    assert cap_feats.decode(None).shape == (2, 512)  # "" is the begin and the end of a sentence


def test_captions_that_are_cut_are_counted(few, make, tmp_path):
    short = make_text_encoder("use", max_tokens=3)
    manifest = make(few, tmp_path / "d", ("cap_feats",), text_encoder=short)
    assert manifest.cache["cap_feats"].num_truncated == 4 * len(openmoji.LANGUAGES)


def test_a_damaged_picture_is_replaced_as_without_a_cache(few, make, tmp_path, caplog):
    make(few, tmp_path / "d", ("latents",))
    assert "Record 1F436 of bucket 32x32 cannot be decoded" in caplog.text
    tokenize = make_text_encoder("use", max_tokens=4).tokenize
    plain = Loader([Dataset(str(few))], batch_size=8, seed=0, tokenize=tokenize)
    quick = Loader(
        [Dataset(str(tmp_path / "d"))],
        batch_size=8,
        seed=0,
        tokenize=tokenize,
        features=("latents",),
    )
    for step in range(3):
        expected, found = plain.batch_at(step), quick.batch_at(step)
        np.testing.assert_array_equal(found["ids"], expected["ids"])
        assert found["captions"] == expected["captions"]
    assert quick.num_replaced == plain.num_replaced > 0


def test_features_can_be_added_one_after_the_other(few, make, tmp_path):
    make(few, tmp_path / "one", ("latents",))
    manifest = make(tmp_path / "one", tmp_path / "two", ("cap_feats",))
    together = make(few, tmp_path / "both")
    assert manifest.cache == together.cache

    def contents(name):
        return {id: record.with_caches() for id, (_, record) in stored(tmp_path / name).items()}

    assert contents("two") == contents("both")


def test_a_finished_cache_is_left_as_it_is_and_another_is_not_replaced_unless_asked(
    few, make, tmp_path
):
    output = tmp_path / "d"
    manifest = make(few, output, ("latents",))
    written = (output / "manifest.json").stat().st_mtime_ns
    assert make(few, output, ("latents",)) == manifest
    assert (output / "manifest.json").stat().st_mtime_ns == written
    with pytest.raises(InputError, match="holds another data set, or features of another encoder"):
        make(few, output)
    assert set(make(few, output, overwrite=True).cache) == set(BOTH)


class Fails(UniversalSentenceEncoder):
    """Stops in the middle of a data set."""

    num_calls = 0

    def tokenize(self, captions, num_slots=None):
        type(self).num_calls += 1
        if self.num_calls == 3:
            raise RuntimeError("out of power")
        return super().tokenize(captions, num_slots)


def test_what_was_stopped_in_the_middle_goes_on_at_its_next_shard(dataset, make, tmp_path):
    failing, output = Fails(max_tokens=8), tmp_path / "d"
    settings = {"text_encoder": failing, "batch_size": 4}
    with pytest.raises(RuntimeError, match="out of power"):
        make(dataset, output, ("cap_feats",), **settings)
    with pytest.raises(InputError, match="is not a finished dataset"):
        Manifest.load(output)
    finished = {path: path.stat().st_mtime_ns for path in output.glob("pictures*")}
    assert finished
    assert not list(output.glob(".*"))  # nothing half-written
    with pytest.raises(InputError, match="features of another encoder"):
        make(dataset, output, BOTH, **settings)

    manifest = make(dataset, output, ("cap_feats",), **settings)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    whole = make(dataset, tmp_path / "whole", ("cap_feats",), **settings)
    assert manifest == whole
    # Captions cut by others meanwhile, such as the threads of the call that failed, do not count.
    assert manifest.cache["cap_feats"].num_truncated > failing.num_truncated == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"system_prompt": "real"}, "system prompt 'base', and data.system_prompt is 'real'"),
        (
            {"text_encoder": UniversalSentenceEncoder(max_tokens=8)},
            r"cap_feats were made by the text encoder 'use .* max_tokens=32', and this run's is "
            r"'use .* max_tokens=8'",
        ),
        (
            {"autoencoder": type("Other", (Pixels,), {"fingerprint": lambda self: "other"})()},
            "latents were made by the autoencoder 'pixels', and this run's is 'other'",
        ),
    ],
)
def test_features_of_another_encoder_are_refused(cached, text_encoder, changes, message):
    manifest = Manifest.load(cached)
    ours = {
        "text_encoder": text_encoder, "autoencoder": Pixels(), "system_prompt": "base",
    }  # fmt: skip
    cache.check(manifest, BOTH, **ours)
    cache.check(manifest, (), **(ours | changes))
    with pytest.raises(InputError, match=f"{message}. Make them again with tools/cache_features"):
        cache.check(manifest, BOTH, **(ours | changes))


@pytest.mark.parametrize(
    ("features", "changes", "message"),
    [
        ((), {}, r"--features must name latents or cap_feats, or both; got \(\)"),
        (("images",), {}, "--features must name latents or cap_feats"),
        (BOTH, {"batch_size": 5}, r"=5 does not split over 2 part\(s\) of the mesh; .*: 4 and 6"),
        (BOTH, {"system_prompt": "real-ish"}, "No system prompt is called 'real-ish'"),
        (BOTH, {"sample": True}, "autoencoder.sample=True draws other latents each time"),
        (
            BOTH,
            {"autoencoder": type("Coarse", (Pixels,), {"downscale": 16})()},
            "buckets 24x40, 40x24 are not multiples of 16 pixels",
        ),
    ],
)
def test_what_cannot_be_cached_is_refused(dataset, make, tmp_path, features, changes, message):
    with pytest.raises(InputError, match=message):
        make(dataset, tmp_path / "d", features, **changes)


def test_a_data_set_is_not_written_over_itself(dataset, make):
    with pytest.raises(InputError, match="is the data set to read; name another directory"):
        make(dataset, dataset, overwrite=True)


@pytest.mark.slow
def test_the_command_says_what_it_wrote_and_what_it_cannot_do(dataset, tmp_path):
    def run(*flags):
        command = [sys.executable, "tools/cache_features.py", "--config=configs/tiny.py", *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    data, output = f"--config.data.directory={dataset}", f"--output={tmp_path / 'd'}"
    done = run(data, output, "--features=cap_feats", "--config.text_encoder.max_tokens=4")
    assert done.returncode == 0, done.stderr
    assert f"24 records with cap_feats in {tmp_path / 'd'}: " in done.stdout
    assert "captions were cut to 4 tokens" in done.stdout
    done = run(data, output, "--features=cap_feets")
    assert done.returncode == 2
    assert "error: The features of" in done.stderr.splitlines()[-1]
