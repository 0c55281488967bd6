"""Pictures become records, or a reason why not; what is stopped goes on; nothing is lost."""

import dataclasses
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from lumina_jax.data import engine, prepare
from lumina_jax.data.buckets import Bucket, bucket_sizes, resize_and_crop
from lumina_jax.data.captions import Caption
from lumina_jax.data.images import Rejected
from lumina_jax.data.prepare import Filter, Settings, make_targets
from lumina_jax.data.records import Manifest, Record, Records
from lumina_jax.data.sources.base import Item
from lumina_jax.errors import InputError
from tests.small_data import ListSource, make_dataset, picture

ROOT = pathlib.Path(__file__).parents[2]
BUCKETS = (Bucket(32, 32), Bucket(40, 24))


def noise(id: str, size=(48, 48), **changes) -> Item:
    rng = np.random.default_rng(list(id.encode()))
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    return dataclasses.replace(picture(id), image=image, **changes)


def stored(directory) -> dict[str, tuple[Bucket, Record]]:
    return {
        record.id: (split.bucket, record)
        for split in Manifest.load(directory).splits
        for record in map(Record, Records(directory, split).read(range(split.num_records)))
    }


def contents(directory) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(pathlib.Path(directory).rglob("*"))
        if path.is_file()
    }


def test_a_picture_is_cropped_into_the_bucket_that_keeps_most_of_it(tmp_path):
    items = [noise("square"), noise("wide", (160, 96)), noise("tall", (48, 64))]
    make_dataset(tmp_path, items, BUCKETS)
    found = stored(tmp_path)
    assert {id: str(bucket) for id, (bucket, _) in found.items()} == {
        "square": "32x32",
        "wide": "40x24",
        "tall": "32x32",
    }
    for item in items:
        bucket, record = found[item.id]
        pixels = np.asarray(Image.open(io.BytesIO(record.image)))
        np.testing.assert_array_equal(pixels, resize_and_crop(item.image, bucket))
        assert record.size == item.image.size
        assert record.captions == item.captions
        assert record.source == "list"


def test_several_resolutions_are_several_data_sets_with_the_official_buckets(tmp_path):
    targets = make_targets(tmp_path, [1024, 256, 512])
    assert [len(target.buckets) for target in targets] == [15, 27, 51]
    items = (noise("a", (1030, 1030)), noise("b", (400, 300)), noise("c", (300, 100)))
    report = prepare.prepare(ListSource(items), tmp_path, targets)
    for resolution, num_records in ((256, 3), (512, 2), (1024, 1)):
        manifest = Manifest.load(tmp_path / str(resolution))
        assert {split.bucket for split in manifest.splits} == set(
            bucket_sizes((resolution // 16) ** 2)
        )
        assert manifest.num_records == num_records
    assert report.num_read == 3
    assert report.written == (3, 2, 1)
    assert report.rejected == ({}, {"too small": 1}, {"too small": 2})
    assert ("c", "300x100, to be enlarged 3.0 times") in report.examples["too small"]


def test_every_picture_is_written_or_has_a_reason(tmp_path):
    jpeg = io.BytesIO()
    noise("j").image.save(jpeg, "JPEG")
    items = [
        noise("good"),
        dataclasses.replace(noise("jpeg"), image=jpeg.getvalue()),
        dataclasses.replace(noise("cut"), image=jpeg.getvalue()[:-200]),
        dataclasses.replace(noise("page"), image=b"<html><body>404"),
        noise("silent", captions=()),
        noise("small", (16, 400)),
        noise("poem", captions=(Caption("x", "poem", "en"),)),
        noise("ugly", scores={"aesthetic": 4.9}),
        noise("marked", scores={"aesthetic": 6.0, "watermark": 0.9}),
        noise("unknown", scores={"watermark": 0.1}),
        dataclasses.replace(noise("good"), id="again"),
        noise("good", (50, 50)),
        Item("broken line", None, fault=Rejected("not JSON", "at byte 12")),
    ]
    scores = {"aesthetic": 5.0, "watermark": 0.0}
    items = [dataclasses.replace(item, scores=item.scores or scores) for item in items]
    filters = (Filter("aesthetic", low=5.0), Filter("watermark", high=0.5))
    settings = Settings(min_size=17, filters=filters)
    targets = make_targets(tmp_path, [32], 4, BUCKETS)
    report = prepare.prepare(ListSource(tuple(items), 3), tmp_path, targets, settings)
    assert set(stored(tmp_path)) == {"good", "jpeg"}
    assert report.num_read == len(items)
    assert report.rejected[0] == {
        "truncated": 1, "not a picture": 1, "no caption": 1, "too small": 1,
        "unknown caption kind": 1, "score aesthetic below 5": 1, "score watermark above 0.5": 1,
        "no score aesthetic": 1, "duplicate": 1, "id taken": 1, "not JSON": 1,
    }  # fmt: skip
    assert report.examples["duplicate"] == [("again", "the same pixels as good")]
    assert report.examples["not JSON"] == [("broken line", "at byte 12")]
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["read"] == 13
    assert saved["resolutions"]["32"]["written"] == 2
    assert saved["resolutions"]["32"]["rejected"] == report.rejected[0]


def test_a_report_in_which_pictures_are_missing_cannot_be_made():
    with pytest.raises(RuntimeError, match="5 pictures were read, but 3 were written and 1 rej"):
        prepare.Report(5, (3,), ({"truncated": 1},), {})


def test_duplicates_are_found_across_parts_and_the_first_one_stays(tmp_path):
    same = noise("same").image
    items = [
        dataclasses.replace(
            picture(f"{name}{n}"), image=same if name == "s" else noise(f"{n}").image
        )
        for n in range(9)
        for name in "sx"
    ]
    make_dataset(tmp_path / "one", items, part_size=2)
    assert sorted(stored(tmp_path / "one")) == ["s0", *(f"x{n}" for n in range(9))]
    manifest = make_dataset(tmp_path / "all", items, part_size=2, keep_duplicates=True)
    assert manifest.num_records == 18


def test_equal_pixels_of_another_shape_are_no_duplicate(tmp_path):
    items = [
        dataclasses.replace(picture(f"{w}"), image=Image.new("RGB", (w, 1600 // w), "red"))
        for w in (40, 50, 32)
    ]
    assert make_dataset(tmp_path, items).num_records == 3


def test_how_the_work_is_cut_changes_no_byte(tmp_path):
    items = [noise(f"{n}", (48, 48) if n % 3 else (60, 36)) for n in range(20)]
    make_dataset(tmp_path / "a", items, BUCKETS, part_size=20, shard_bytes=9000)
    make_dataset(tmp_path / "b", items, BUCKETS, part_size=3, shard_bytes=9000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert [len(split.shards) for split in Manifest.load(tmp_path / "a").splits] == [5, 3]


def test_processes_make_what_one_process_makes(tmp_path):
    items = tuple(noise(f"{n}") for n in range(12))
    targets = [make_targets(tmp_path / name, [32], 4, BUCKETS) for name in "ab"]
    prepare.prepare(ListSource(items, 5), tmp_path / "a", targets[0])
    workers = engine.Processes(2)
    prepare.prepare(ListSource(items, 5), tmp_path / "b", targets[1], engine=workers)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_fingerprint_follows_the_content(tmp_path):
    items = [noise("a"), noise("b")]
    first = make_dataset(tmp_path / "first", items)
    assert make_dataset(tmp_path / "same", items).fingerprint == first.fingerprint
    for name, others in (
        ("caption", [noise("a"), noise("b", captions=(Caption("b", "short", "en"),))]),
        ("order", items[::-1]),
        ("id", [noise("a"), dataclasses.replace(noise("b"), id="c")]),
    ):
        assert make_dataset(tmp_path / name, others).fingerprint != first.fingerprint


class Stops(engine.Engine):
    """Is interrupted in the middle of the tasks named."""

    def __init__(self, description: str, after: int):
        super().__init__()
        self._stop_at = description, after

    def run(self, description, function, tasks):
        for number, task in enumerate(tasks):
            if (description, number) == self._stop_at:
                raise KeyboardInterrupt
            function(task)


@pytest.mark.parametrize("stop", [("Reading", 0), ("Reading", 2), ("Writing", 0), ("Writing", 3)])
def test_what_was_stopped_goes_on_where_it_was(tmp_path, stop):
    items = [noise(f"{n}", (48, 48) if n % 3 else (60, 36)) for n in range(20)]
    targets = make_targets(tmp_path / "d", [32], 4, BUCKETS)
    settings = Settings(shard_bytes=9000)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(
            ListSource(tuple(items), 5), tmp_path / "d", targets, settings, engine=Stops(*stop)
        )
    with pytest.raises(InputError, match="is not a finished dataset"):
        Manifest.load(tmp_path / "d")
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "d").glob("pictures*")}
    spooled = {p: p.stat().st_mtime_ns for p in (tmp_path / "d" / "unfinished").glob("*.npz")}
    assert (len(finished), len(spooled)) == {
        ("Reading", 0): (0, 0), ("Reading", 2): (0, 2), ("Writing", 0): (0, 4),
        ("Writing", 3): (3, 4),
    }[stop]  # fmt: skip

    seen = []

    class Watched(engine.Engine):
        def run(self, description, function, tasks):
            for task in tasks:
                function(task)
            seen.extend(p for p, t in spooled.items() if p.exists() and p.stat().st_mtime_ns != t)

    prepare.prepare(
        ListSource(tuple(items), 5), tmp_path / "d", targets, settings, engine=Watched()
    )
    assert not seen
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    make_dataset(tmp_path / "whole", items, BUCKETS, part_size=5, shard_bytes=9000)
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    left = tmp_path / f".pictures-train_32x32.array_record-00000-of-00001.{'0' * 32}"
    others = [tmp_path / name for name in (".hidden", f"x.{'0' * 32}", ".a.bcd")]
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(
            ListSource((noise("a"),)),
            tmp_path,
            make_targets(tmp_path, [32], 4, BUCKETS),
            engine=Stops("Writing", 0),
        )
    for path in (left, *others):
        path.write_bytes(b"")
    make_dataset(tmp_path, [noise("a")], BUCKETS)
    assert not left.exists()
    assert all(path.exists() for path in others)


def test_a_run_killed_in_its_last_moment_is_a_finished_one(tmp_path):
    make_dataset(tmp_path, [noise("a")])
    before = contents(tmp_path)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "000000.npz").write_bytes(b"what is left")
    (tmp_path / "unfinished" / "settings.json").write_text("{}")
    make_dataset(tmp_path, [noise("a")])
    assert contents(tmp_path) == before
    assert not (tmp_path / "unfinished").exists()


@pytest.mark.slow
def test_a_command_killed_at_any_moment_goes_on(tmp_path):
    def command(output):
        return [
            sys.executable, "tools/prepare_data.py", "openmoji", f"--output={output}",
            "--resolution=32,64", "--shard_mb=0.2", "--num_workers=2", "--emojis=all",
        ]  # fmt: skip

    def files() -> set:
        walk = os.walk(tmp_path / "d")  # which goes on where a folder has gone
        return {os.path.join(folder, name) for folder, _, names in walk for name in names}

    run = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    num_killed = 0
    # By what it has done, so that on any machine it has done something and is not at its end: it
    # makes about 200 files, a quarter of them while it reads.
    for num_files in np.random.default_rng(0).integers(1, 60, size=6):
        before = files()
        process = subprocess.Popen(command(tmp_path / "d"), start_new_session=True, **run)
        while process.poll() is None and len(files() - before) < num_files:
            time.sleep(0.01)
        if process.poll() is not None:
            assert process.returncode == 0
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        num_killed += 1
    assert num_killed >= 3
    subprocess.run(command(tmp_path / "whole"), check=True, **run)
    subprocess.run(command(tmp_path / "d"), check=True, **run)
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


def test_workers_end_when_their_parent_was_killed(tmp_path):
    script = (
        "from lumina_jax.data.engine import Processes; import time\n"
        "if __name__ == '__main__': Processes(2).run('', time.sleep, [60, 60])"
    )
    (tmp_path / "sleep.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, tmp_path / "sleep.py"], env=environment)

    def children() -> list[str]:
        listed = subprocess.run(
            ["pgrep", "-f", "multiprocessing.spawn", "-P", str(process.pid)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return listed.stdout.split()

    deadline = time.monotonic() + 20
    while len(workers := children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    while any(pathlib.Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline + 20
        time.sleep(0.1)


def test_a_finished_data_set_is_left_as_it_is(tmp_path):
    items = [noise("a"), noise("b", captions=())]
    make_dataset(tmp_path, items)
    before = contents(tmp_path)
    report = prepare.prepare(
        ListSource((*items, noise("c"))), tmp_path, make_targets(tmp_path, [32], 4, BUCKETS[:1])
    )
    assert contents(tmp_path) == before
    assert (report.num_read, report.written) == (2, (1,))
    assert report.rejected == ({"no caption": 1},)


def test_other_settings_need_overwrite(tmp_path):
    make_dataset(tmp_path, [noise("a")], BUCKETS)
    with pytest.raises(
        InputError,
        match=r"buckets is \['32x32', '40x24'\] there and \['32x32'\] here; min_size is 1 there an",
    ):
        make_dataset(tmp_path, [noise("b")], min_size=8)
    manifest = make_dataset(tmp_path, [noise("b")], min_size=8, overwrite=True)
    assert Manifest.load(tmp_path) == manifest
    assert set(stored(tmp_path)) == {"b"}
    assert not list(tmp_path.glob("*40x24*"))


def test_what_is_unfinished_belongs_to_its_settings_and_its_source(tmp_path):
    items = tuple(noise(f"{n}") for n in range(4))
    targets = make_targets(tmp_path, [32], 4, BUCKETS)

    def go_on(items, settings=None, **options):
        return prepare.prepare(ListSource(items, 2), tmp_path, targets, settings, **options)

    with pytest.raises(KeyboardInterrupt):
        go_on(items, engine=Stops("Writing", 0))
    with pytest.raises(InputError, match="min_size is 1 there and 9 here"):
        go_on(items, Settings(min_size=9))
    with pytest.raises(InputError, match="or the source has changed"):
        go_on((*items, noise("5")))
    assert go_on((*items, noise("5")), overwrite=True).written == (5,)


def test_what_is_no_data_set_is_never_removed(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match=r"holds files but no manifest\.json"):
        make_dataset(tmp_path, [noise("a")])
    with pytest.raises(InputError, match="so --overwrite does not touch it"):
        make_dataset(tmp_path, [noise("a")], overwrite=True)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_folder_of_others_called_unfinished_is_never_removed(tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "chapter1.txt").write_text("dear")
    (tmp_path / "LICENSE").write_text("mine")
    (tmp_path / "report.json").write_text("{}")
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"holds chapter1\.txt and is not of this|no manifest"):
            make_dataset(tmp_path, [noise("a")], overwrite=overwrite)
        targets = make_targets(tmp_path, [32, 64], 4)
        with pytest.raises(InputError, match=r"holds chapter1\.txt and is not of this command"):
            prepare.prepare(ListSource((noise("a"),)), tmp_path, targets, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_overwriting_that_was_killed_leaves_nothing_of_the_old_source(tmp_path):
    """Whatever was removed already: the note on whose it is goes last."""
    targets = make_targets(tmp_path, [32], 4, BUCKETS)
    old, new = (tuple(noise(f"{name}{n}") for n in range(4)) for name in ("old", "new"))
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(ListSource(old), tmp_path, targets, engine=Stops("Writing", 0))
    removed = []

    def die(paths):
        removed.extend(paths)
        raise KeyboardInterrupt

    other = Settings(min_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fsspec.implementations.local.LocalFileSystem.rm", lambda fs, paths: die(paths)
        )
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(ListSource(new), tmp_path, targets, other, overwrite=True)
    assert removed
    assert not any(path.endswith("settings.json") for path in removed)
    with pytest.raises(InputError, match="min_size is 1 there and 2 here"):
        prepare.prepare(ListSource(new), tmp_path, targets, other)
    prepare.prepare(ListSource(new), tmp_path, targets, other, overwrite=True)
    assert set(stored(tmp_path)) == {item.id for item in new}


def test_a_data_set_is_not_mixed_with_several_below_it(tmp_path):
    make_dataset(tmp_path, [noise("a")])
    before = contents(tmp_path)
    with pytest.raises(InputError, match="is a data set itself, so none can be made below it"):
        prepare.prepare(
            ListSource((noise("a"),)), tmp_path, make_targets(tmp_path, [32, 64], 4), overwrite=True
        )
    assert contents(tmp_path) == before


def test_a_data_set_without_its_report_says_so(tmp_path):
    make_dataset(tmp_path, [noise("a")])
    (tmp_path / "report.json").unlink()
    with pytest.raises(InputError, match=r"is complete, but report\.json is gone"):
        make_dataset(tmp_path, [noise("a")])


def test_names_that_are_no_unicode_do_not_end_a_run(tmp_path):
    odd = Item("x", None, fault=Rejected("not found", "caf\udce9.png"))
    make_dataset(tmp_path, [noise("a"), odd])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["examples"]["not found"] == [["x", "caf\udce9.png"]]


def test_an_attempt_that_met_other_pictures_does_not_mix_with_another(tmp_path):
    """Two workers on one part, of which one could not read a picture: one of them is believed."""
    targets = make_targets(tmp_path, [32], 4, BUCKETS)
    items = [noise("a", (60, 36)), noise("b"), noise("c", (60, 36)), noise("d")]
    lost = [Item("a", None, fault=Rejected("not found")), *items[1:]]

    class Twice(engine.Engine):
        def run(self, description, function, tasks):
            for task in tasks:
                function(task)
                if description == "Reading":
                    other = prepare.Job(ListSource(tuple(lost)), *rest)
                    index = other._path(task, "npz")
                    kept = index.read_bytes()
                    index.unlink()
                    other.process_part(task)  # its spools come last,
                    index.write_bytes(kept)  # the index of the first one stays

    source = ListSource(tuple(items))
    rest = (os.fspath(tmp_path / "unfinished"), targets, Settings())
    report = prepare.prepare(source, tmp_path, targets, engine=Twice())
    assert report.written == (4,)
    assert {id: str(bucket) for id, (bucket, _) in stored(tmp_path).items()} == {
        "a": "40x24", "b": "32x32", "c": "40x24", "d": "32x32"
    }  # fmt: skip


def _die(number):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_ends_the_run_with_a_word():
    with pytest.raises(InputError, match="A worker was killed, perhaps because memory ran out"):
        engine.Processes(2).run("", _die, range(4))


def test_no_picture_at_all_is_refused_and_the_report_says_why(tmp_path):
    with pytest.raises(InputError, match=r"None of the 1 pictures .*report\.json says why"):
        make_dataset(tmp_path, [noise("a", captions=())])
    assert json.loads((tmp_path / "report.json").read_text())["read"] == 1


def test_buckets_must_be_whole_tokens_within_the_budget(tmp_path):
    with pytest.raises(InputError, match="60x36 is not a multiple of 16 pixels"):
        make_targets(tmp_path, [48], 16, [Bucket(60, 36)])
    with pytest.raises(InputError, match="64x64 holds more than 144 tokens"):
        make_targets(tmp_path, [48], 4, [Bucket(64, 64)])
    with pytest.raises(InputError, match="Resolution 50 is not a multiple of 4 pixels per token"):
        make_targets(tmp_path, [50])
    with pytest.raises(InputError, match="Buckets 48x48, 48x48: need one or more, each once"):
        make_targets(tmp_path, [48], 4, [Bucket(48, 48)] * 2)
    with pytest.raises(InputError, match="Buckets are sizes of one resolution, and there are 2"):
        make_targets(tmp_path, [32, 48], 4, [Bucket(48, 48)])
    with pytest.raises(InputError, match="Output s3://bucket/d: ArrayRecord does not read that"):
        make_targets("s3://bucket/d", [32])
    with pytest.raises(InputError, match=r"Resolutions \[32, 32\]: need one or more, each once"):
        make_targets(tmp_path, [32, 32])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit": "stretch"}, "fit='stretch' is not crop or pad"),
        ({"min_size": 0}, "min_size=0 must be 1 pixel or more"),
        ({"max_upscale": 0.0}, "max_upscale=0.0 must be above 0"),
        ({"quality": 100}, "quality=100 must be 1 to 95"),
        ({"shard_bytes": 0}, "shard_bytes=0 must be 1 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Settings(**settings)


def test_small_pictures_are_lossless_and_large_ones_are_jpeg():
    image = noise("a").image
    assert Image.open(io.BytesIO(prepare.encode(image, 128, 95))).format == "PNG"
    assert Image.open(io.BytesIO(prepare.encode(image, 256, 95))).format == "JPEG"
