"""Small programs, compiled once for a TPU that need not be there."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("compile_programs.py")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> pathlib.Path:
    """A folder with `<name>.hlo` of each program in compile_programs.py, and kernels' bundles."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install libtpu")
    folder = tmp_path_factory.mktemp("compiled")
    root = SCRIPT.parents[2]
    subprocess.run(
        [sys.executable, SCRIPT, folder],
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    return folder
