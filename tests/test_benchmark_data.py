"""The comparison as a user runs it, with numbers that are too small to mean anything."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from lumina_jax.errors import InputError
from tools.photographs import photographs

pytest.importorskip("torch")
pytest.importorskip("webdataset")

ROOT = pathlib.Path(__file__).parents[1]
RUN_WITHOUT_WEBDATASET = """
import runpy, sys
sys.modules["webdataset"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*command, **options):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False, **options
    )


def benchmark(*flags):
    return run("tools/benchmark_data.py", *flags)


@pytest.mark.slow
def test_all_give_the_same_pictures_and_are_compared(tmp_path):
    done = benchmark(
        "--resolution=144",
        "--num_pictures=12",
        "--batch_size=4",
        "--rounds=2",
        "--seconds=0.05",
        f"--output={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    assert "12 crops of 144 x 144 px" in done.stdout
    assert "the same pixels and captions from all" in done.stdout
    speeds, ratios = done.stdout.split("lumina_jax is as fast as")
    for name in ("lumina_jax", "torch", "webdataset", "simplejpeg", "pillow"):
        median, low, high = numbers(rf"^{name} +", speeds)
        assert 0 < low <= median <= high
    (better, *_), (torch, *_), (webdataset, *_) = (
        numbers(rf"^{name} +", ratios) for name in ("the better of the two", "torch", "webdataset")
    )
    assert 0 < better <= min(torch, webdataset)
    assert len(list((tmp_path / "144px" / "files").glob("*.jpg"))) == 12


def numbers(name, text):
    (line,) = re.findall(name + r"([\d., ]+)", text, re.MULTILINE)
    return [float(number) for number in line.replace(",", "").split()]


def test_all_faults_of_the_flags_are_said_at_once():
    done = benchmark(
        "--resolution=128", "--num_pictures=10", "--batch_size=4", "--rounds=0", "--output=x"
    )
    assert done.returncode == 2
    assert "--resolution=128 must be a multiple of 16 from 144 on" in done.stderr
    assert "--num_pictures=10 must be a multiple of --batch_size=4" in done.stderr
    assert "--rounds=0 and --seconds=4.0 must be more than nothing" in done.stderr


def test_a_missing_package_is_named():
    done = run(
        *("-c", RUN_WITHOUT_WEBDATASET),
        *("tools/benchmark_data.py", "--output=x"),
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'tools'}"},
    )
    assert done.returncode == 2
    assert "webdataset must be installed: pip install 'lumina-jax[dev]'" in done.stderr


def test_missing_photographs_say_how_to_get_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"package 'skimage' are needed.*pip install 'lumina-jax"):
        list(photographs())
