"""Storage that fails: what only this machine met must not choose other rows than elsewhere."""

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from lumina_jax.data import loader as loader_module
from lumina_jax.data import records
from lumina_jax.data.loader import Dataset, Loader, read_pictures
from lumina_jax.data.sources import make_source, reading
from lumina_jax.errors import InputError
from tests.small_data import damage, make_dataset, picture


@pytest.fixture
def make(tmp_path, tokenize):
    make_dataset(tmp_path / "d", [picture(name) for name in "abcdefgh"])
    directory = Dataset(str(tmp_path / "d"))
    return lambda: Loader([directory], batch_size=4, seed=0, tokenize=tokenize)


def test_a_store_that_fails_for_a_while_gives_the_same_rows(make, monkeypatch, caplog):
    expected = make().batch_at(0)
    monkeypatch.setattr(loader_module, "_PAUSES", (0.0, 0.0, 0.0))
    read, failures = records.Records.read, iter([True, True, False, False, True])

    def read_or_fail(self, indices):
        self.remote = True  # as a bucket is
        if next(failures, False):
            raise RuntimeError("UNAVAILABLE: try again")
        return read(self, indices)

    monkeypatch.setattr(records.Records, "read", read_or_fail)
    failing = make()
    found = failing.batch_at(0)
    np.testing.assert_array_equal(found["ids"], expected["ids"])
    assert failing.num_replaced == 0
    assert "Reading again in 0 s, after: UNAVAILABLE" in caplog.text


def test_a_store_that_fails_for_good_stops_the_run(make, monkeypatch):
    def fail(self, indices):
        raise RuntimeError("Too many open files")

    monkeypatch.setattr(records.Records, "read", fail)
    with pytest.raises(InputError, match=r"train_32x32.* cannot be read \(Too many open files\)"):
        make().batch_at(0)


def test_more_shards_than_files_that_may_be_open_are_refused_at_the_start(make, monkeypatch):
    monkeypatch.setattr(records.resource, "getrlimit", lambda _: (100, 200))
    with pytest.raises(InputError, match=r"1 shards, and this process may open 200 files"):
        make()


def test_a_damaged_picture_is_not_taken_twice_when_all_are_read_once(make, tmp_path, caplog):
    damage(tmp_path / "d", {"a", "d"})
    ids = [found["id"] for found in read_pictures(tmp_path / "d")]
    assert ids == ["b", "c", "e", "f", "g", "h"]
    assert caplog.text.count("it is left out") == 2


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"gone cannot be read \(No such file or directory\)"):
        reading.names_below(LocalFileSystem(), str(tmp_path / "gone"))


def test_pictures_of_the_same_name_in_two_folders_are_two(tmp_path):
    for folder in "xy":
        (tmp_path / folder).mkdir()
        picture(folder).image.save(tmp_path / folder / "0.png")
        (tmp_path / folder / "train.jsonl").write_text('{"path": "0.png", "prompt": "p"}')
    source = make_source("json", str(tmp_path))
    items = [item for part in source.parts() for item in source.read(part)]
    assert [item.id for item in items] == ["x/0.png", "y/0.png"]
    source = make_source("json", str(tmp_path / "x" / "train.jsonl"))
    (item,) = [item for part in source.parts() for item in source.read(part)]
    assert item.id == "0.png"
