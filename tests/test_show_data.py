"""The command as a user runs it: from the root of the repository, as a file."""

import pathlib
import subprocess
import sys

import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]


def show_data(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/show_data.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_it_prints_numbers_and_draws_pictures(dataset, tmp_path):
    done = show_data(
        f"--data={dataset}", "--config=configs/tiny.py", f"--output={tmp_path}", "--tokens",
        "--num_pictures=3", "--config.text_encoder.max_tokens=128",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "24 records of openmoji at 32 px, 24 of them read" in done.stdout
    # 64 image slots, all full; captions of about five tokens in 128 text slots, then in 64.
    lines = [line.split() for line in done.stdout.splitlines()]
    (mixed,) = [line for line in lines if line[:1] == ["mixed"]]
    assert mixed[1:3] == ["100%", "128"]
    (short,) = [line for line in lines if line[:2] == ["short", "100%"]]
    assert short[2] == "64"
    assert 'config.data.text_slots = {"short": 64}' in done.stdout
    *lines, written = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert written == f"statistics.png and 3 sheets in {tmp_path}"

    sheets = ["24x40.png", "32x32.png", "40x24.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*sheets, "statistics.png"]
    sizes = {}
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            sizes[path.name] = picture.size
    # One row of three pictures on each: those of the wide bucket leave the others their height.
    assert sizes["24x40.png"] == sizes["32x32.png"]
    assert sizes["24x40.png"][1] > sizes["40x24.png"][1] > 200


@pytest.mark.slow
def test_what_is_missing_is_said(tmp_path):
    for arguments, message in [
        ([], "Missing --data. Only a config with data.directory can do without."),
        ([f"--data={tmp_path}", "--tokens"], "give --config as well"),
    ]:
        done = show_data(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_help_shows_an_example():
    done = show_data("--help")
    assert "python tools/show_data.py --data=" in done.stdout + done.stderr
    assert "--num_records" in done.stdout + done.stderr
