"""The same tasks on Apache Beam, which has an environment of its own: `make test-beam`."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("apache_beam")

ROOT = pathlib.Path(__file__).parents[2]
PROCESSES = "--direct_num_workers=2 --direct_running_mode=multi_processing"


def start(output: pathlib.Path, *arguments: str) -> subprocess.Popen:
    command = [
        sys.executable, "tools/prepare_data.py", "openmoji", f"--output={output}",
        "--resolution=32,64", "--shard_mb=0.2", *arguments,
    ]  # fmt: skip
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **silent)


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What processes of this machine make of all emojis."""
    output = tmp_path_factory.mktemp("beam") / "whole"
    assert start(output).wait() == 0
    return contents(output)


@pytest.mark.parametrize("options", ["", PROCESSES])
def test_beam_makes_what_processes_make(whole, tmp_path, options):
    assert start(tmp_path / "d", "--engine=beam", f"--beam_options={options}").wait() == 0
    assert contents(tmp_path / "d") == whole


def test_a_killed_pipeline_goes_on_without_doing_anything_twice(whole, tmp_path):
    output, kept = tmp_path / "d", {}
    for done in ("unfinished/*.npz", "*/pictures-*"):
        process = start(output, "--engine=beam")
        while not any(output.glob(done)) and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kept |= {path: path.stat().st_mtime_ns for path in output.glob(done)}
    assert kept
    process = start(output, "--engine=beam")
    while process.poll() is None:
        changed = [p for p, t in kept.items() if p.exists() and p.stat().st_mtime_ns != t]
        assert not changed
        time.sleep(0.05)
    assert process.returncode == 0
    assert contents(output) == whole
