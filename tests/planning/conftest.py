"""Small programs, compiled once for a TPU that need not be there."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import pytest

SCRIPT = pathlib.Path(__file__).with_name("compile_programs.py")
ROOT = SCRIPT.parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

# A model of the same layers as the large ones, but small; 144 image and 192 text slots, 336 tokens,
# numbers that no size of the model has.
SMALL = (
    "--config=configs/stage1.py", "--config.mesh.replica=1", "--config.mesh.data=-1",
    "--config.model.preset=tiny", "--config.model.dim=320",
    "--config.model.hidden_dim=1024", "--config.model.axes_dims=(16,32,32)",
    "--config.model.num_layers=2", "--config.data.resolution=192",
    "--config.text_encoder.max_tokens=192", "--config.train.batch_size=16",
)  # fmt: skip


class Planned(NamedTuple):
    status: int
    json: dict
    out: str
    err: str


def run_plan(folder: pathlib.Path, *arguments: str) -> Planned:
    """tools/plan.py in a process of its own."""
    path = folder / "plan.json"
    done = subprocess.run(
        [sys.executable, ROOT / "tools/plan.py", *arguments, f"--json={path}"],
        capture_output=True, text=True, check=False, cwd=ROOT, env=ENVIRONMENT,
    )  # fmt: skip
    found = json.loads(path.read_text()) if path.exists() else {}
    return Planned(done.returncode, found, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def libtpu() -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install libtpu")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, libtpu) -> pathlib.Path:
    """A folder with `<name>.hlo` of each program in compile_programs.py."""
    folder = tmp_path_factory.mktemp("compiled")
    subprocess.run([sys.executable, SCRIPT, folder], check=True, cwd=ROOT, env=ENVIRONMENT)
    return folder


@pytest.fixture(scope="session")
def small_plan(tmp_path_factory, libtpu) -> tuple[Planned, str]:
    """The plan of SMALL on eight chips, with one assertion that fails, and the compiled text."""
    folder = tmp_path_factory.mktemp("small")
    planned = run_plan(
        folder, *SMALL, "--topology=v5e:2x4", f"--hlo={folder / 'program.hlo'}", "--hottest=3",
        "--assert=peak_gib<=15", "--assert=flops_ratio>=1", "--assert=mfu >= 0.99",
    )  # fmt: skip
    assert planned.json, planned.err
    return planned, (folder / "program.hlo").read_text()
