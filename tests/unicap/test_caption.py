"""The command as a user runs it: pictures without captions, a server, a table."""

import json
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

from lumina_jax.data import prepare
from lumina_jax.data.caption_table import Merge, Table
from lumina_jax.data.records import Manifest
from lumina_jax.data.sources import make_source
from lumina_jax.data.sources.captioned import WithTable
from tests.unicap import captioning_server

ROOT = pathlib.Path(__file__).parents[2]
COLOURS = ((220, 40, 40), (40, 160, 60), (40, 70, 200), (240, 210, 40), (130, 50, 160))


def caption(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/caption.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    for n in range(8):
        Image.new("RGB", (100 + 10 * n, 150 - 5 * n), COLOURS[n % 5]).save(folder / f"{n}.png")
    (folder / "inner" / "broken.jpg").write_bytes(b"nothing")
    return folder


def test_a_folder_without_captions_gets_them_from_a_server(photos, tmp_path):
    def misbehave(number, body):
        return "503" if number % 5 == 4 else None

    with captioning_server.running(misbehave) as server:
        done = caption(
            *("folder", f"--input={photos}", f"--output={tmp_path / 'table'}"),
            *(f"--server={server.url}", "--dollars_per_hour=2", "--concurrency=4"),
        )
        again = caption(
            "folder", f"--input={photos}", f"--output={tmp_path / 'table'}",
            f"--server={server.url}", "--concurrency=2",
        )  # fmt: skip
        asked = server.num_requests
    assert done.returncode == 0, done.stderr
    assert "9 pictures, 1 of them without captions" in done.stdout
    assert "not a picture: 1" in done.stdout
    assert "for 100,000,000 pictures" in done.stdout
    assert "dollars" in done.stdout
    table = Table.load(tmp_path / "table")
    rows = list(table.rows())
    assert [row.id for row in rows] == [*(f"{n}.png" for n in range(8)), "inner/broken.jpg"]
    assert {len(row.captions) for row in rows[:8]} == {8}
    report = json.loads((tmp_path / "table" / "report.json").read_text())
    assert report["passed"]["tags/zh"] == 8
    assert sum(report["lengths"]["long/en"].values()) == 8  # counted as the text encoder reads them
    assert again.returncode == 0, again.stderr
    assert asked <= 64 * 5 // 4 + 4  # the finished table was left alone

    source = WithTable(make_source("folder", str(photos), needs_captions=False), Merge((table,)))
    targets = prepare.make_targets(tmp_path / "data", [64])
    prepared = prepare.prepare(source, tmp_path / "data", targets)
    assert prepared.written == (8,)
    manifest = Manifest.load(tmp_path / "data")
    assert manifest.kinds == ("long", "medium", "short", "tags")
    assert manifest.languages == ("en", "zh")


def test_a_pilot_of_drawings_in_another_language_with_prompts_of_ones_own(tmp_path):
    """Two servers: one looks, the other works on text. German has no prompts of its own."""
    mine = tmp_path / "mine"
    mine.mkdir()
    built_in = ROOT / "lumina_jax" / "unicap" / "prompt_files" / "1"
    for name in ("en.toml", "zh.toml", "other.toml"):
        (mine / name).write_text((built_in / name).read_text())
    with captioning_server.running() as look, captioning_server.running(models=("t",)) as text:
        done = caption(
            *("openmoji", f"--output={tmp_path / 'table'}", "--pilot=4", "--emojis=🐶🍎🚲🏠🌵"),
            *(f"--server={look.url}", f"--text_server={text.url}", f"--prompts={mine}"),
            *("--kinds=long,short", "--languages=en,zh"),
        )
        assert (look.num_requests, text.num_requests) == (4, 12)
    assert done.returncode == 0, done.stderr
    table = Table.load(tmp_path / "table")
    assert table.settings["models"] == ["small-vl", "t"]
    assert table.settings["prompts"].startswith("mine-")
    assert table.settings["source"]["options"]["pilot"] == 4
    assert len(list(table.rows())) == 4


@pytest.mark.slow
def test_a_model_with_random_weights_writes_nothing_that_passes(photos, tmp_path):
    """All the way through transformers: each answer is looked at, none is a caption."""
    pytest.importorskip("torch")
    from tests.unicap import tiny_qwen

    model = tiny_qwen.save(tmp_path / "tiny", "qwen2_5_vl")
    done = caption(
        *("folder", f"--input={photos}", f"--output={tmp_path / 'table'}", f"--model={model}"),
        *("--kinds=short", "--languages=en,de", "--attempts=2", "--device=cpu", "--pilot=2"),
    )
    assert done.returncode == 0, done.stderr
    table = Table.load(tmp_path / "table")
    assert table.settings["models"][0].startswith("tiny-")
    rows = [row for row in table.rows() if row.fault is None]
    assert len(rows) == 2
    for row in rows:
        assert row.captions == ()
        assert [e.language for e in row.excluded] == ["en", "de"]
        assert row.excluded[1].fault == "nothing to make it from"
        assert len(row.rejected) == 2
        assert row.tokens[1] > 0


def test_servers_that_are_gone_end_the_command_to_be_given_again(photos, tmp_path):
    with captioning_server.running() as server:
        pass
    done = caption(
        *("folder", f"--input={photos}", f"--output={tmp_path / 'table'}"),
        *(f"--server={server.url}", "--server_model=small-vl", "--patience=0.5"),
    )
    assert done.returncode == 75
    assert "give the same command again" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "Give --model=<folder>, for a model in this process, or --server"),
        (["--server=http://a/v1", "--model=b"], "one of them"),
        (["--server=a:80"], "'a:80' is no http:// or https:// URL"),
        (["--server=http://a/v1", "--extra=[1]"], "is not a JSON object: it is no object"),
        (["--server=http://a/v1", "--dollars_per_million_tokens=1,nan"], "is not two numbers"),
        (["--server=http://a/v1", "--overwrite", "--num_workers=8"], "--overwrite would remove"),
        (
            ["--server=http://a/v1", "--text_server=http://b/v1", "--kinds=short",
             "--languages=en"],
            "condense and translate, and these captions need neither",
        ),
    ],
)  # fmt: skip
def test_wrong_flags_are_told(photos, tmp_path, flags, told):
    done = caption("folder", f"--input={photos}", f"--output={tmp_path / 'table'}", *flags)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert not (tmp_path / "table").exists()
