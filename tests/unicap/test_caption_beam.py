"""Captions written on Apache Beam, which has an environment of its own: `make test-beam`."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from lumina_jax.data.caption_table import Table
from tests.unicap import captioning_server

pytest.importorskip("apache_beam")

ROOT = pathlib.Path(__file__).parents[2]
PROCESSES = "--direct_num_workers=2 --direct_running_mode=multi_processing"


def start(output: pathlib.Path, url: str, *arguments: str) -> subprocess.Popen:
    command = [
        sys.executable, "tools/caption.py", "openmoji", f"--output={output}", f"--server={url}",
        "--kinds=long,tags", "--languages=en", "--concurrency=1",
        "--pilot=80", *arguments,
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True)


def rows(directory: pathlib.Path) -> list:
    return [(row.id, row.captions, row.excluded) for row in Table.load(directory).rows()]


@pytest.mark.parametrize("options", ["", PROCESSES])
def test_beam_writes_what_one_process_writes_also_after_a_kill(tmp_path, options):
    with captioning_server.running() as server:
        assert start(tmp_path / "one", server.url).wait() == 0
        beam = ("--engine=beam", f"--beam_options={options}")
        process = start(tmp_path / "beam", server.url, *beam)
        while not any((tmp_path / "beam").glob("part-*")) and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert start(tmp_path / "beam", server.url, *beam).wait() == 0
    assert rows(tmp_path / "beam") == rows(tmp_path / "one")
    assert len(rows(tmp_path / "one")) == 80
