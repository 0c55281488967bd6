"""The command as a user runs it, and every source through the whole of the preparation."""

import json
import pathlib
import shutil
import subprocess
import sys
import tarfile

import pytest
from PIL import Image

from lumina_jax.data import prepare
from lumina_jax.data.buckets import Bucket, choose_bucket, resize_and_crop
from lumina_jax.data.captions import Caption
from lumina_jax.data.prepare import make_targets
from lumina_jax.data.records import Manifest, Record, Records
from lumina_jax.data.sources import make_source
from tests.data.broken import make_broken
from tests.small_data import make_emojis
from tools.photographs import photographs

ROOT = pathlib.Path(__file__).parents[2]


def prepare_data(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/prepare_data.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def stored(directory) -> dict[str, Record]:
    return {
        record.id: record
        for split in Manifest.load(directory).splits
        for record in map(Record, Records(directory, split).read(range(split.num_records)))
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photographs with captions beside them."""
    folder = tmp_path_factory.mktemp("photos")
    for name, content in photographs():
        path = folder / name
        path.write_bytes(content)
        path.with_suffix(".txt").write_text(f"a photograph of {path.stem}\n")
    return folder


def test_photographs_and_broken_files_are_all_accounted_for(photos, tmp_path):
    expected = make_broken(tmp_path / "raw" / "broken")
    for name in expected:
        path = tmp_path / "raw" / "broken" / name
        path.rename(path.with_name(f"{name}.jpg"))  # whatever they are, they say they are JPEG
        path.with_name(f"{name}.txt").write_text("x")
    shutil.copytree(photos, tmp_path / "raw", dirs_exist_ok=True)
    names = pictures(photos)
    targets = make_targets(tmp_path / "d", [64, 256], None)
    settings = prepare.Settings(max_upscale=1.0)
    source = make_source("folder", str(tmp_path / "raw"))
    report = prepare.prepare(source, tmp_path / "d", targets, settings)
    assert report.num_read == len(expected) + len(names)

    small, large = stored(tmp_path / "d" / "64"), stored(tmp_path / "d" / "256")
    assert set(large) == set(names)
    good = {f"broken/{name}.jpg" for name, outcome in expected.items() if outcome.reason is None}
    assert {record_id for record_id in small if record_id.startswith("broken/")} <= good
    for name, outcome in expected.items():
        if outcome.reason is not None:
            assert report.rejected[0][outcome.reason] >= 1, name
    reasons = {outcome.reason for outcome in expected.values()} - {None}
    assert set(report.rejected[0]) - reasons <= {"too small", "duplicate"}

    record = large["china.jpg"]
    with Image.open(photos / "china.jpg") as photograph:
        bucket = choose_bucket(*photograph.size, targets[1].buckets)
        assert record.image == prepare.encode(resize_and_crop(photograph, bucket), 256, 95)
        assert record.size == photograph.size
    assert record.captions == (Caption("a photograph of china", "long", "en"),)


def pictures(photos) -> list[str]:
    return sorted(path.name for path in photos.iterdir() if path.suffix != ".txt")


def write_as_json(photos, folder):
    lines = [
        {"image_path": name, "prompt": (photos / name).with_suffix(".txt").read_text()}
        for name in pictures(photos)
    ]
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"path": str(folder / "all.jsonl"), "root": str(photos)}


def write_as_webdataset(photos, folder):
    with tarfile.open(folder / "0.tar", "w") as tar:
        for path in sorted(photos.iterdir()):
            tar.add(path, path.name)
    return {"path": str(folder)}


def write_as_parquet(photos, folder):
    parquet, pyarrow = (pytest.importorskip(name) for name in ("pyarrow.parquet", "pyarrow"))
    paths = [photos / name for name in pictures(photos)]
    columns = {
        "image": [path.read_bytes() for path in paths],
        "text": [path.with_suffix(".txt").read_text().strip() for path in paths],
    }
    parquet.write_table(pyarrow.table(columns), folder / "0.parquet")
    return {"path": str(folder)}


@pytest.mark.parametrize(
    ("kind", "write"),
    [
        ("json", write_as_json),
        ("webdataset", write_as_webdataset),
        ("parquet", write_as_parquet),
    ],
)
def test_every_source_gives_the_same_records(photos, tmp_path, kind, write):
    (tmp_path / "raw").mkdir()
    options = write(photos, tmp_path / "raw")
    found = []
    for name, source in (
        ("folder", make_source("folder", str(photos))),
        (kind, make_source(kind, options.pop("path"), **options)),
    ):
        prepare.prepare(source, tmp_path / name, make_targets(tmp_path / name, [128], 8))
        found.append(stored(tmp_path / name).values())
    images, captions = (
        [sorted(str(getattr(record, name)) for record in records) for records in found]
        for name in ("image", "captions")
    )
    assert images[0] == images[1]
    assert captions[0] == captions[1]
    assert len(images[0]) > 5


def test_a_data_set_of_ours_can_be_prepared_again_at_another_size(tmp_path):
    make_emojis(tmp_path / "large", "🐶🐱🍎")
    source = make_source("tfds", str(tmp_path / "large"))
    prepare.prepare(source, tmp_path / "d", make_targets(tmp_path / "d", [16], 4, [Bucket(16, 16)]))
    large, small = stored(tmp_path / "large"), stored(tmp_path / "d")
    assert {i: r.captions for i, r in small.items()} == {i: r.captions for i, r in large.items()}
    assert "CC BY-SA 4.0" in Manifest.load(tmp_path / "d").attribution


def test_the_command_writes_a_dataset_and_says_what_it_wrote(tmp_path):
    output = tmp_path / "few"
    done = prepare_data(
        "openmoji", f"--output={output}", "--resolution=48", "--emojis=🐶🇩🇪",
        "--buckets=48x48,60x36,36x60",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"2 records of openmoji in {output}: 2 of 3 buckets" in done.stdout
    assert "License: CC BY-SA 4.0" in done.stdout
    assert Manifest.load(output).num_records == 2
    with Image.open(output / "report.png") as report:
        assert min(report.size) > 100


def test_the_command_reports_what_it_left_out(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "raw")
    (tmp_path / "raw" / "page.jpg").write_text("<html>")
    (tmp_path / "raw" / "page.txt").write_text("a page")
    num = len(pictures(photos))
    done = prepare_data(
        "folder", f"--input={tmp_path / 'raw'}", f"--output={tmp_path / 'd'}",
        "--resolution=128,256", "--kind=short", "--language=de", "--num_workers=1",
        "--license=CC0", "--attribution=by all of them",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rejected: not a picture" in done.stdout
    assert f"{num} records of folder in {tmp_path / 'd' / '256'}" in done.stdout
    assert "captions short in de" in done.stdout
    assert "by all of them" in done.stdout
    report = json.loads((tmp_path / "d" / "report.json").read_text())
    assert report["examples"]["not a picture"][0][0] == "page.jpg"
    manifest = Manifest.load(tmp_path / "d" / "128")
    assert (manifest.license, manifest.attribution) == ("CC0", "by all of them")


def test_bad_input_is_one_line_and_status_two(tmp_path):
    output = f"--output={tmp_path / 'd'}"
    for arguments, message in [
        (["openmoji", output, "--emojis=🐶dog"], "no drawing of 'dog'"),
        (["openmoji", output, "--root=x"], "openmoji takes no --root"),
        (["openmoji"], "Missing --output"),
        (["photos"], "name one of openmoji, folder"),
        (["folder", output], "Missing --input, where the folder source is"),
        (["json", output, "--input=x", "--min_score=5"], "--min_score=5 is not name=number"),
        (["json", output, "--input=x", "--beam_options=-x"], "--beam_options are of --engine=beam"),
    ]:
        done = prepare_data(*arguments)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "d").exists()


def test_what_is_read_and_what_is_written_are_kept_apart(photos, tmp_path):
    before = sorted(photos.iterdir())
    for output in (photos, photos / "d"):
        done = prepare_data("folder", f"--input={photos}", f"--output={output}", "--overwrite")
        assert done.returncode == 2
        assert "lies in --input=" in done.stderr
    assert sorted(photos.iterdir()) == before
    done = prepare_data("folder", "--input=gs://bucket/p", "--output=gs://bucket/p/d/")
    assert done.returncode == 2
    assert "lies in --input=" in done.stderr


def test_help_shows_an_example():
    done = prepare_data("--help")
    assert "python tools/prepare_data.py folder --input=" in done.stdout + done.stderr
    assert "--pixels_per_token" in done.stdout + done.stderr
