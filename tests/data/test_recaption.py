"""Captions of a table come into a dataset, and nothing else of it changes."""

import base64
import dataclasses
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from ml_dtypes import bfloat16

from lumina_jax import files
from lumina_jax.data import engine, prepare, recaption, records
from lumina_jax.data.buckets import Bucket
from lumina_jax.data.caption_table import Merge
from lumina_jax.data.captions import Caption
from lumina_jax.data.loader import Dataset, Loader
from lumina_jax.data.prepare import make_targets
from lumina_jax.data.records import (
    CapFeatsCache,
    CaptionSet,
    LatentsCache,
    Manifest,
    Record,
    Records,
)
from lumina_jax.data.sources import make_source
from lumina_jax.data.sources.captioned import WithTable
from lumina_jax.errors import InputError
from tests.small_data import (
    ListSource,
    caption_row,
    make_caption_table,
    make_dataset,
    make_emojis,
    picture,
)

ROOT = pathlib.Path(__file__).parents[2]
BUCKETS = (Bucket(32, 32), Bucket(40, 24))
SMALL = {"shard_bytes": 1000, "keep_duplicates": True}  # a few records in a shard


def items(count: int):
    """Pictures 00, 01, ..., every third of them wide."""
    return [picture(f"{n:02d}", (40, 40) if n % 3 else (50, 30)) for n in range(count)]


def told(id: str) -> Caption:
    return caption_row(id).captions[0].caption


def make_table(directory, ids, size: int = 4):
    """A table with a caption of each picture, so many to a piece."""
    rows = [caption_row(id) for id in ids]
    return make_caption_table(
        directory, *(rows[first : first + size] for first in range(0, len(rows), size))
    )


def stored(directory) -> list[Record]:
    """All records, in order."""
    return [
        record
        for split in Manifest.load(directory).splits
        for record in map(Record, Records(directory, split).read(range(split.num_records)))
    ]


def contents(directory) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(pathlib.Path(directory).rglob("*"))
        if path.is_file()
    }


def add_caches(directory) -> None:
    """Gives every record latents and features of its captions, as an encoder would."""
    manifest = Manifest.load(directory)
    rng = np.random.default_rng(0)

    def features(*shape):
        return rng.normal(size=shape).astype(bfloat16).tobytes()

    splits = []
    for split in manifest.splits:
        shards = []
        shape = split.bucket.height // 8, split.bucket.width // 8, 4
        for shard in split.shards:
            path = pathlib.Path(directory) / shard.name
            found = [Record(c) for c in records.read_shard(path, range(shard.num_records))]
            with records.shard_writer(path) as write:
                for record in found:
                    cap_feats = [features(3, 5) for _ in record.captions]
                    write(record.with_caches(latents=features(*shape), cap_feats=cap_feats))
            shards.append(dataclasses.replace(shard, num_bytes=path.stat().st_size))
        splits.append(dataclasses.replace(split, shards=tuple(shards)))
    empty = base64.b64encode(features(1, 5)).decode()
    cache = {
        "latents": LatentsCache("an autoencoder", 8, 4),
        "cap_feats": CapFeatsCache("a text encoder", "empty", 16, 5, 0, empty),
    }
    records.finish(directory, dataclasses.replace(manifest, splits=tuple(splits), cache=cache))


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures without captions, large enough for 64 px."""
    for n, id in enumerate(("a.png", "b.png", "below/c.png", "below/d.png")):
        path = tmp_path / "photos" / id
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(f"{n}", (80, 80)).image.save(path)
    return tmp_path / "photos"


def test_captions_change_and_nothing_else_does(tmp_path, caplog):
    make_dataset(tmp_path / "old", items(12), BUCKETS, **SMALL)
    add_caches(tmp_path / "old")
    table = make_table(tmp_path / "captions", [f"{n:02d}" for n in range(12)])
    with caplog.at_level(logging.INFO):
        report = recaption.recaption(tmp_path / "old", tmp_path / "new", [table])
    assert (report.num_read, report.written, report.rejected) == (12, (12,), ({},))
    assert "tools/cache_features.py" in caplog.text

    before, after = stored(tmp_path / "old"), stored(tmp_path / "new")
    assert [record.id for record in after] == [record.id for record in before]
    for old, new in zip(before, after, strict=True):
        assert new.captions == (told(old.id),)
        assert (new.image, new.latents) == (old.image, old.latents)
        assert (new.size, new.source) == (old.size, old.source)
        assert not new.cap_feats
        # But for captions and their features the records are the same to the last byte.
        assert new.with_captions([]) == old.with_captions([])

    old, new = (Manifest.load(tmp_path / name) for name in ("old", "new"))
    assert set(new.cache) == {"latents"}
    assert new.cache["latents"] == old.cache["latents"]
    assert [s.num_records for s in new.splits] == [s.num_records for s in old.splits] == [8, 4]
    assert [len(split.shards) for split in new.splits] == [len(s.shards) for s in old.splits]
    assert new.kinds == ("long",)
    assert (new.license, new.attribution, new.source) == ("CC0", "by nobody", "list")
    merged = {
        "dataset": old.fingerprint,
        "caption_mode": "replace",
        "caption_tables": [table.fingerprint],
    }
    assert new.settings == {**old.settings, "recaptioned": [merged]}
    assert not (tmp_path / "new" / "unfinished").exists()
    records.check_complete(tmp_path / "new", new.splits)


def test_the_records_are_those_of_a_dataset_prepared_with_the_table(photos, tmp_path):
    for path in [*photos.rglob("*.png")][:3]:
        path.with_suffix(".txt").write_text(f"beside {path.stem}")
    ids = ["a.png", "b.png", "below/c.png", "below/d.png"]
    table = make_table(tmp_path / "captions", ids, 1)
    plain = make_source("folder", str(photos))
    bare = make_source("folder", str(photos), needs_captions=False)
    (target,) = make_targets(tmp_path / "plain", [32], 4, BUCKETS)
    assert prepare.prepare(plain, tmp_path / "plain", [target]).written == (3,)
    for mode, written in (("replace", 4), ("add", 4)):
        directory, copy = tmp_path / mode, tmp_path / f"{mode} copy"
        (target,) = make_targets(directory, [32], 4, BUCKETS)
        source = WithTable(bare, Merge((table,), mode))
        assert prepare.prepare(source, directory, [target]).written == (written,)
        recaption.recaption(tmp_path / "plain", copy, [table], mode=mode)
        prepared = {record.id: record.with_caches() for record in stored(directory)}
        copied = {record.id: record.with_caches() for record in stored(copy)}
        assert len(copied) == 3
        assert copied == {id: prepared[id] for id in copied}


def test_one_table_serves_the_pictures_and_datasets_of_any_resolution(photos, tmp_path, tokenize):
    """Made of the raw pictures, whose ids the records keep."""
    bare = make_source("folder", str(photos), needs_captions=False)
    ids = [item.id for part in bare.parts() for item in bare.read(part)]
    first, second = (
        make_caption_table(
            tmp_path / name, [caption_row(id, Caption(f"{name} {id}", "short", "zh")) for id in ids]
        )
        for name in ("first", "second")
    )
    targets = make_targets(tmp_path / "d", [32, 64], 4)
    prepare.prepare(WithTable(bare, Merge((first,))), tmp_path / "d", targets)
    for resolution in (32, 64):
        directory, copy = (tmp_path / name / str(resolution) for name in ("d", "copy"))
        assert {c.text for record in stored(directory) for c in record.captions} == {
            f"first {id}" for id in ids
        }
        recaption.recaption(directory, copy, [second])
        loader = Loader([Dataset(str(copy))], batch_size=4, seed=0, tokenize=tokenize)
        seen = {caption for step in range(4) for caption in loader.batch_at(step)["captions"]}
        assert seen - {""} == {f"second {id}" for id in ids}
        assert loader.batch_at(0)["images"].shape == (4, resolution, resolution, 3)


def test_added_captions_come_behind_those_of_the_record(tmp_path):
    make_dataset(tmp_path / "old", items(6), **SMALL)
    table = make_table(tmp_path / "captions", ["00", "03"])
    same = make_caption_table(
        tmp_path / "same", [caption_row("03", Caption("caption of 03", "short", "en"))]
    )
    report = recaption.recaption(tmp_path / "old", tmp_path / "new", [table, same], mode="add")
    assert (report.written, report.rejected) == ((6,), ({},))
    for old, new in zip(stored(tmp_path / "old"), stored(tmp_path / "new"), strict=True):
        assert new.captions == old.captions + ((told(new.id),) if new.id in ("00", "03") else ())
    (split,) = Manifest.load(tmp_path / "new").splits
    assert split.caption_sets == (
        CaptionSet((("long", "en"), ("short", "en")), 2, "00"),
        CaptionSet((("short", "en"),), 4, "01"),
    )


def test_a_record_without_caption_is_left_out_and_counted(tmp_path):
    make_dataset(tmp_path / "old", items(9), BUCKETS, **SMALL)
    table = make_table(tmp_path / "captions", [f"{n:02d}" for n in range(9) if n not in (1, 5)])
    report = recaption.recaption(tmp_path / "old", tmp_path / "new", [table])
    assert (report.num_read, report.written, report.rejected) == (9, (7,), ({"no caption": 2},))
    assert report.examples == {"no caption": [("01", "no table has it"), ("05", "no table has it")]}
    assert [r.id for r in stored(tmp_path / "new")] == ["02", "04", "07", "08", "00", "03", "06"]
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == {
        "read": 9,
        "resolutions": {"32": {"written": 7, "rejected": {"no caption": 2}}},
        "examples": {"no caption": [["01", "no table has it"], ["05", "no table has it"]]},
    }


@pytest.fixture
def gaps(tmp_path):
    """A dataset of several shards, and a table that leaves some of them without a record."""
    manifest = make_dataset(tmp_path / "old", items(30), BUCKETS, **SMALL)
    square, wide = manifest.splits
    assert min(len(square.shards), len(wide.shards)) > 2
    begins = np.cumsum([0, *(shard.num_records for shard in square.shards)]).tolist()
    ids = [Record(c).id for c in Records(tmp_path / "old", square).read(range(square.num_records))]
    lost = {*ids[: begins[1]], *ids[begins[2] : begins[3]]}  # the first and the third shard
    kept = [id for id in ids if id not in lost]
    return make_table(tmp_path / "captions", kept), kept


def test_shards_without_records_leave_no_gap(gaps, tmp_path, tokenize):
    table, kept = gaps
    report = recaption.recaption(tmp_path / "old", tmp_path / "new", [table])
    assert report.written == (len(kept),)
    square, wide = Manifest.load(tmp_path / "new").splits
    count = len(Manifest.load(tmp_path / "old").splits[0].shards) - 2
    assert [s.name for s in square.shards] == [
        records.shard_name(square.bucket, index, count) for index in range(count)
    ]
    assert all(shard.num_records for shard in square.shards)
    assert (wide.shards, wide.caption_sets) == ((), ())  # none of its pictures is in the table
    names = {path.name for path in (tmp_path / "new").glob("pictures*")}
    assert names == {shard.name for shard in square.shards}
    assert [record.id for record in stored(tmp_path / "new")] == kept

    data = tfds.builder_from_directory(tmp_path / "new").as_data_source(
        square.name, decoders={"image": tfds.decode.SkipDecoding()}
    )
    assert [data[row]["id"].decode() for row in range(len(data))] == kept
    loader = Loader([Dataset(str(tmp_path / "new"))], batch_size=4, seed=0, tokenize=tokenize)
    seen = {caption for step in range(20) for caption in loader.batch_at(step)["captions"]}
    assert seen - {""} == {told(id).text for id in kept}
    assert loader.num_replaced == 0


class Stops(engine.Engine):
    """Is interrupted before a task, or after the last one."""

    def __init__(self, at: int):
        super().__init__()
        self._at = at

    def _run(self, function, tasks, advance):
        for number, task in enumerate(tasks):
            if number == self._at:
                raise KeyboardInterrupt
            function(task)
        raise KeyboardInterrupt


@pytest.mark.parametrize("at", [0, 1, 4, 1000])
def test_what_was_stopped_goes_on_where_it_was(gaps, tmp_path, at):
    table, _ = gaps
    with pytest.raises(KeyboardInterrupt):
        recaption.recaption(tmp_path / "old", tmp_path / "new", [table], engine=Stops(at))
    with pytest.raises(InputError, match="is not a finished dataset"):
        Manifest.load(tmp_path / "new")
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "new").rglob("*.json")}
    num_shards = sum(len(split.shards) for split in Manifest.load(tmp_path / "old").splits)
    assert len(finished) == min(at, num_shards)

    class Watched(engine.Engine):
        def _run(self, function, tasks, advance):
            super()._run(function, tasks, advance)
            assert {path: path.stat().st_mtime_ns for path in finished} == finished

    recaption.recaption(tmp_path / "old", tmp_path / "new", [table], engine=Watched())
    recaption.recaption(tmp_path / "old", tmp_path / "whole", [table])
    assert contents(tmp_path / "new") == contents(tmp_path / "whole")


@pytest.mark.parametrize("num_done", [0, 1, 2])
def test_what_was_killed_while_shards_were_renamed_goes_on(gaps, tmp_path, monkeypatch, num_done):
    table, _ = gaps
    move, done = files.move, []

    def die(path, target):
        if len(done) == num_done:
            raise KeyboardInterrupt
        done.append(target)
        move(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "move", die)
        with pytest.raises(KeyboardInterrupt):
            recaption.recaption(tmp_path / "old", tmp_path / "new", [table])
    assert not (tmp_path / "new" / "manifest.json").exists()
    recaption.recaption(tmp_path / "old", tmp_path / "new", [table])
    recaption.recaption(tmp_path / "old", tmp_path / "whole", [table])
    assert contents(tmp_path / "new") == contents(tmp_path / "whole")


@pytest.mark.parametrize("last", ["manifest.json", "report.json"])
def test_a_run_killed_in_its_last_moment_is_finished_by_the_next(gaps, tmp_path, monkeypatch, last):
    table, _ = gaps
    what = {"manifest.json": "save_report", "report.json": "files.remove_folder"}[last]

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"lumina_jax.data.recaption.{what}", die)
        with pytest.raises(KeyboardInterrupt):
            recaption.recaption(tmp_path / "old", tmp_path / "new", [table])
    assert (tmp_path / "new" / last).exists()
    report = recaption.recaption(tmp_path / "old", tmp_path / "new", [table])
    assert recaption.recaption(tmp_path / "old", tmp_path / "whole", [table]) == report
    assert contents(tmp_path / "new") == contents(tmp_path / "whole")


def test_processes_make_what_one_process_makes(gaps, tmp_path):
    table, _ = gaps
    recaption.recaption(tmp_path / "old", tmp_path / "one", [table])
    recaption.recaption(tmp_path / "old", tmp_path / "two", [table], engine=engine.Processes(2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_finished_copy_is_left_as_it_is_and_another_needs_overwrite(gaps, tmp_path):
    table, kept = gaps
    first = recaption.recaption(tmp_path / "old", tmp_path / "new", [table])
    before = contents(tmp_path / "new")
    assert recaption.recaption(tmp_path / "old", tmp_path / "new", [table]) == first
    assert contents(tmp_path / "new") == before

    other = make_table(tmp_path / "other", kept[:3])
    for tables, mode in (([other], "replace"), ([table], "add"), ([table, other], "replace")):
        with pytest.raises(InputError, match="holds another data set, or one with other captions"):
            recaption.recaption(tmp_path / "old", tmp_path / "new", tables, mode=mode)
    assert contents(tmp_path / "new") == before
    report = recaption.recaption(tmp_path / "old", tmp_path / "new", [other], overwrite=True)
    assert report.written == (3,)
    recaption.recaption(tmp_path / "old", tmp_path / "whole", [other])
    assert contents(tmp_path / "new") == contents(tmp_path / "whole")

    (tmp_path / "new" / "report.json").unlink()
    with pytest.raises(InputError, match=r"is complete, but report\.json is gone"):
        recaption.recaption(tmp_path / "old", tmp_path / "new", [other])


def test_what_is_unfinished_belongs_to_its_tables(gaps, tmp_path):
    table, kept = gaps
    with pytest.raises(KeyboardInterrupt):
        recaption.recaption(tmp_path / "old", tmp_path / "new", [table], engine=Stops(2))
    other = make_table(tmp_path / "other", kept[:3])
    with pytest.raises(InputError, match="or one with other captions"):
        recaption.recaption(tmp_path / "old", tmp_path / "new", [other])
    report = recaption.recaption(tmp_path / "old", tmp_path / "new", [other], overwrite=True)
    assert report.written == (3,)
    assert [record.id for record in stored(tmp_path / "new")] == kept[:3]


def test_the_fingerprint_follows_the_dataset_the_tables_and_the_mode(tmp_path):
    ids = [f"{n:02d}" for n in range(4)]
    make_dataset(tmp_path / "old", items(4), **SMALL)
    make_dataset(tmp_path / "longer", items(5), **SMALL)
    table, other = (make_table(tmp_path / f"t{size}", ids[:size]) for size in (4, 3))

    def fingerprint(dataset, *tables, mode="replace"):
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        recaption.recaption(tmp_path / dataset, output, tables, mode=mode)
        return Manifest.load(output).fingerprint

    first = fingerprint("old", table)
    assert fingerprint("old", table) == first
    others = [
        fingerprint("longer", table),
        fingerprint("old", other),
        fingerprint("old", table, other),
        fingerprint("old", table, mode="add"),
        Manifest.load(tmp_path / "old").fingerprint,
    ]
    assert len({first, *others}) == 6


def test_a_copy_can_be_given_captions_again(tmp_path):
    make_dataset(tmp_path / "old", items(4), **SMALL)
    ids = [f"{n:02d}" for n in range(4)]
    first = make_table(tmp_path / "first", ids)
    second = make_caption_table(
        tmp_path / "second", [caption_row(id, Caption(id, "tags", "zh")) for id in ids]
    )
    recaption.recaption(tmp_path / "old", tmp_path / "new", [first])
    recaption.recaption(tmp_path / "new", tmp_path / "newer", [second], mode="add")
    assert all(
        record.captions == (told(record.id), Caption(record.id, "tags", "zh"))
        for record in stored(tmp_path / "newer")
    )
    steps = Manifest.load(tmp_path / "newer").settings["recaptioned"]
    assert [step["caption_mode"] for step in steps] == ["replace", "add"]


def test_a_table_of_other_pictures_is_refused_with_the_ids_of_both(tmp_path):
    make_dataset(tmp_path / "old", items(4), **SMALL)
    other = make_table(tmp_path / "other", ["photos/00.jpg", "photos/01.jpg"])
    with pytest.raises(
        InputError, match=r"None of the 4 records .* ids such as 00, .* such as photos/00\.jpg"
    ):
        recaption.recaption(tmp_path / "old", tmp_path / "new", [other])
    assert not (tmp_path / "new" / "manifest.json").exists()
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["resolutions"]["32"] == {"written": 0, "rejected": {"no caption": 4}}
    table = make_table(tmp_path / "captions", ["00"])
    report = recaption.recaption(tmp_path / "old", tmp_path / "new", [table], overwrite=True)
    assert report.written == (1,)


def test_wrong_directories_are_refused_at_the_door(gaps, tmp_path):
    table, _ = gaps
    before = contents(tmp_path)
    old = tmp_path / "old"
    for dataset, output, message in (
        (tmp_path / "nowhere", tmp_path / "new", "is not a finished dataset"),
        (tmp_path / "captions", tmp_path / "new", "is not a finished dataset"),
        (old, old, "is the dataset to read; name another directory"),
        (old, tmp_path / "captions" / ".." / "old", "is the dataset to read"),
        (old, "s3://bucket/d", "ArrayRecord does not read that store"),
        (old, tmp_path / "captions", r"holds files but no manifest\.json"),
    ):
        with pytest.raises(InputError, match=message):
            recaption.recaption(dataset, output, [table])
    with pytest.raises(InputError, match="so --overwrite does not touch it"):
        recaption.recaption(old, tmp_path / "captions", [table], overwrite=True)
    shard = next(old.glob("pictures*"))
    shard.rename(tmp_path / "shard")
    with pytest.raises(InputError, match=f"lacks {shard.name}"):
        recaption.recaption(old, tmp_path / "new", [table])
    (tmp_path / "shard").rename(shard)
    assert contents(tmp_path) == before


def test_a_damaged_record_is_named_and_nothing_of_its_shard_is_written(tmp_path):
    manifest = make_dataset(tmp_path / "old", items(4), keep_duplicates=True)
    (shard,) = manifest.splits[0].shards
    with records.shard_writer(tmp_path / "old" / shard.name) as write:
        for _ in range(4):
            write(b"no record")
    size = (tmp_path / "old" / shard.name).stat().st_size
    changed = dataclasses.replace(
        manifest.splits[0], shards=(dataclasses.replace(shard, num_bytes=size),)
    )
    dataclasses.replace(manifest, splits=(changed,)).save(tmp_path / "old")
    table = make_table(tmp_path / "captions", ["00"])
    with pytest.raises(InputError, match=rf"{shard.name} cannot be copied \(damaged record"):
        recaption.recaption(tmp_path / "old", tmp_path / "new", [table])
    assert not list((tmp_path / "new").glob("*pictures*"))


def test_a_report_in_which_records_are_missing_cannot_be_made(tmp_path, monkeypatch):
    make_dataset(tmp_path / "old", items(4), **SMALL)
    table = make_table(tmp_path / "captions", ["00"])
    monkeypatch.setattr(recaption.Counts, "leave_out", lambda self, id, why: None)
    with pytest.raises(RuntimeError, match="4 pictures were read, but 1 were written and 0 reject"):
        recaption.recaption(tmp_path / "old", tmp_path / "new", [table])


def test_a_copy_in_a_bucket_is_the_copy_on_a_disk(bucket, gaps, tmp_path, monkeypatch):
    """Even one that was killed where a shard had both of its names."""
    table, kept = gaps
    remote = make_table(f"{bucket}/captions", kept)
    targets = make_targets(f"{bucket}/old", [32], 4, BUCKETS)
    prepare.prepare(
        ListSource(tuple(items(30))), f"{bucket}/old", targets, prepare.Settings(**SMALL)
    )
    recaption.recaption(tmp_path / "old", tmp_path / "new", [table])

    def copy_and_die(path, target):
        path.copy(target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "move", copy_and_die)
        with pytest.raises(KeyboardInterrupt):
            recaption.recaption(f"{bucket}/old", f"{bucket}/new", [remote])
    recaption.recaption(f"{bucket}/old", f"{bucket}/new", [remote])
    here, there = (Manifest.load(directory) for directory in (tmp_path / "new", f"{bucket}/new"))
    assert here == there
    for shard in (shard for split in here.splits for shard in split.shards):
        copied = (epath.Path(bucket) / "new" / shard.name).read_bytes()
        assert copied == (tmp_path / "new" / shard.name).read_bytes()
    names = {name for name in files.sizes(f"{bucket}/new") if name.startswith("pictures")}
    assert names == {path.name for path in (tmp_path / "new").glob("pictures*")}
    assert not (epath.Path(bucket) / "new" / "unfinished").exists()


def prepare_data(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/prepare_data.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_copies_a_dataset_with_other_captions(tmp_path):
    make_emojis(tmp_path / "old", "🐶🐱🍎")
    ids = [record.id for record in stored(tmp_path / "old")]
    make_table(tmp_path / "captions", ids[:2])
    arguments = (
        "dataset", f"--input={tmp_path / 'old'}", f"--output={tmp_path / 'new'}",
        f"--caption_table={tmp_path / 'captions'}",
    )  # fmt: skip
    done = prepare_data(*arguments, "--num_workers=1")
    assert done.returncode == 0, done.stderr
    assert f"2 records of openmoji in {tmp_path / 'new'}: 1 of 1 buckets" in done.stdout
    assert "rejected: no caption" in done.stdout
    assert "captions long in en" in done.stdout
    assert "License: CC BY-SA 4.0" in done.stdout
    assert [record.id for record in stored(tmp_path / "new")] == ids[:2]
    assert (tmp_path / "new" / "report.png").stat().st_size > 1000


def test_every_source_takes_captions_of_a_table(tmp_path, photos):
    bare = make_source("folder", str(photos), needs_captions=False)
    ids = [item.id for part in bare.parts() for item in bare.read(part)]
    make_table(tmp_path / "captions", [*ids[:2], "1F436"])
    table = f"--caption_table={tmp_path / 'captions'}"
    for source, kept in (
        (("openmoji", "--emojis=🐶🐱"), ["1F436"]),
        (("folder", f"--input={photos}"), ids[:2]),
    ):
        output = tmp_path / source[0]
        done = prepare_data(
            *source, f"--output={output}", "--resolution=32", table, "--num_workers=1"
        )
        assert done.returncode == 0, done.stderr
        assert sorted(record.id for record in stored(output)) == kept
        report = json.loads((output / "report.json").read_text())
        assert ["no table has it"] * len(report["examples"]["no caption"]) == [
            detail for _, detail in report["examples"]["no caption"]
        ]
    # Captions of another mode are another dataset.
    done = prepare_data(
        *source, f"--output={output}", "--resolution=32", table, "--caption_mode=add"
    )
    assert done.returncode == 2
    assert "caption_mode is 'replace' there and 'add' here" in done.stderr


def test_bad_input_is_one_line_and_status_two(tmp_path):
    make_emojis(tmp_path / "old", "🐶")
    make_table(tmp_path / "captions", ["1F436"])
    given = f"--input={tmp_path / 'old'}"
    output, table = f"--output={tmp_path / 'd'}", f"--caption_table={tmp_path / 'captions'}"
    for arguments, message in [
        (["dataset", output], "Missing --input, --caption_table"),
        (["dataset", output, given, table, "--resolution=256", "--nokeep_duplicates"],
         "takes no --keep_duplicates, --resolution: its pictures stay"),
        (["dataset", given, f"--output={tmp_path / 'old' / 'new'}", table], "lies in --input="),
        (["openmoji", output, "--caption_mode=add"], "--caption_mode is of --caption_table"),
        (["openmoji", output, f"--caption_table={tmp_path}"], "is no table of captions"),
    ]:  # fmt: skip
        done = prepare_data(*arguments)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "d").exists()


@pytest.mark.slow
def test_a_command_killed_at_any_moment_goes_on(tmp_path):
    make_dataset(tmp_path / "old", items(90), BUCKETS, **SMALL)
    make_table(tmp_path / "captions", [f"{n:02d}" for n in range(90) if n // 9 % 2])

    def command(output):
        return [
            sys.executable, "tools/prepare_data.py", "dataset", f"--input={tmp_path / 'old'}",
            f"--output={output}", f"--caption_table={tmp_path / 'captions'}", "--num_workers=1",
        ]  # fmt: skip

    def found() -> set:
        walk = os.walk(tmp_path / "new")
        return {os.path.join(folder, name) for folder, _, names in walk for name in names}

    run = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    num_killed = 0
    for num_files in np.random.default_rng(0).integers(1, 20, size=5):
        before = found()
        process = subprocess.Popen(command(tmp_path / "new"), start_new_session=True, **run)
        while process.poll() is None and len(found() - before) < num_files:
            time.sleep(0.001)
        if process.poll() is not None:
            assert process.returncode == 0
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        num_killed += 1
    assert num_killed >= 2
    subprocess.run(command(tmp_path / "whole"), check=True, **run)
    subprocess.run(command(tmp_path / "new"), check=True, **run)
    assert contents(tmp_path / "new") == contents(tmp_path / "whole")
