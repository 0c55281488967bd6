"""Data in a bucket: prepared there, checked there, read from there.

The bucket is an emulator on loopback. Three clients must agree on it: fsspec's, that of epath, and
the one inside ArrayRecord.
"""

import pathlib

import numpy as np
import pytest
import tensorstore
from etils import epath

from lumina_jax import files
from lumina_jax.data import prepare, records
from lumina_jax.data.buckets import Bucket
from lumina_jax.data.loader import Dataset, Loader
from lumina_jax.data.prepare import make_targets
from lumina_jax.data.records import Manifest
from lumina_jax.data.sources import make_source
from lumina_jax.errors import InputError
from lumina_jax.lease import Lease
from tests.small_data import ListSource, picture


def test_data_in_a_bucket_is_the_data_on_a_disk(bucket, tmp_path, tokenize):
    items = tuple(picture(name * n) for name in "abcdef" for n in range(1, 4))
    settings = prepare.Settings(shard_bytes=2000)
    directories = (tmp_path / "d", f"{bucket}/d")
    for directory in directories:
        targets = make_targets(directory, [32], 4, [Bucket(32, 32)])
        prepare.prepare(ListSource(items, 5), directory, targets, settings)
    here, there = (Manifest.load(directory) for directory in directories)
    assert here == there
    assert len(here.splits[0].shards) > 2
    assert not (epath.Path(bucket) / "d" / "unfinished").exists()

    loaders = [
        Loader([Dataset(str(directory))], batch_size=4, seed=0, tokenize=tokenize)
        for directory in directories
    ]
    for step in range(4):
        local, remote = (loader.batch_at(step) for loader in loaders)
        np.testing.assert_array_equal(local["images"], remote["images"])
        assert local["captions"] == remote["captions"]
    assert loaders[1].num_replaced == 0

    shard = epath.Path(bucket) / "d" / here.splits[0].shards[0].name
    shard.unlink()
    with pytest.raises(InputError, match=f"{bucket}/d lacks {shard.name}"):
        Loader([Dataset(f"{bucket}/d")], batch_size=4, seed=0, tokenize=tokenize)


def test_pictures_are_read_out_of_a_bucket(bucket, tmp_path):
    folder = epath.Path(bucket) / "raw"
    picture("a").image.save(tmp_path / "a.png")
    (folder / "a.png").write_bytes((tmp_path / "a.png").read_bytes())
    (folder / "a.txt").write_text("a caption")
    targets = make_targets(tmp_path / "d", [32], 4, [Bucket(32, 32)])
    report = prepare.prepare(make_source("folder", f"{bucket}/raw"), tmp_path / "d", targets)
    assert (report.num_read, report.written) == (1, (1,))


def test_a_shard_that_is_not_finished_is_not_in_the_bucket(bucket):
    path = epath.Path(bucket) / "half" / "shard"

    def fail():
        with records.shard_writer(path) as write:
            write(b"x")
            raise RuntimeError("out of power")

    with pytest.raises(RuntimeError, match="out of power"):
        fail()
    assert not path.exists()
    with records.shard_writer(path) as write:
        write(b"x")
    assert list(records.read_shard(path, [0])) == [b"x"]
    assert not pathlib.Path("gs:").exists()


def test_what_other_clients_write_is_seen(bucket):
    folder = epath.Path(bucket) / "listed"
    (folder / "a").write_bytes(b"1")
    assert {path.name for path in folder.iterdir()} == set(files.sizes(folder)) == {"a"}
    store = tensorstore.KvStore.open(f"{folder}/").result()
    store.write("b", b"23").result()
    assert {path.name for path in folder.iterdir()} == {"a", "b"}
    assert files.sizes(folder) == {"a": 1, "b": 2}
    assert (folder / "b").read_bytes() == b"23"
    assert store.read("a").result().value == b"1"


def test_a_path_in_a_bucket_is_no_folder_of_this_one(bucket):
    assert str(files.absolute(f"{bucket}/run")) == "gs://bucket/run"
    assert files.absolute("run") == epath.Path(pathlib.Path.cwd()) / "run"


def test_a_workdir_in_a_bucket_is_held_by_one_run(bucket):
    settings = dict(renew=0.2, patience=2.0, settle=0.5)
    with Lease("gs://bucket/run", **settings) as first:
        with pytest.raises(InputError, match="is in use: process"):
            Lease("gs://bucket/run", **settings).__enter__()
        first.check()
    assert not epath.Path("gs://bucket/run/run.lock").exists()
