"""Wrong input at the command line: one line, status 2, no traceback."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(*command):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("-m lumina_jax.train --config=configs/tiny.py --config.model.dimm=3", 'mean "dim"'),
        ("-m lumina_jax.train --config=configs/tiny.py --workdirr=x", "Did you mean --workdir"),
        ("-m lumina_jax.train --config=configs/tiny.py", "Missing --workdir"),
        ("-m lumina_jax.train --config=configs/none.py --workdir=x", "configs/none.py"),
        ("-m lumina_jax.train --config=configs/tiny.py --config.seed=a", "seed"),
        ("-m lumina_jax.sample --checkpoint=nowhere", "No prompt was given"),
        ("-m lumina_jax.sample --checkpoint=nowhere --prompt=a", "is not the workdir of a run"),
        ("-m lumina_jax.evaluate --checkpoint=nowhere extra", "Got the argument(s) extra"),
    ],
)
def test_wrong_input_is_told_in_one_line(command, message):
    done = run(*command.split())
    errors = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert errors[-1].startswith("error: ")
    assert message in errors[-1]


@pytest.mark.parametrize("module", ["train", "sample", "evaluate"])
def test_help_shows_an_example(module):
    done = run("-m", f"lumina_jax.{module}", "--help")
    assert f"python -m lumina_jax.{module} --" in done.stdout
    assert done.returncode == 0, done.stderr
