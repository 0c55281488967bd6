"""A few hundred of the inputs of `python -m tests.fuzz`; and that it finds what it looks for."""

import subprocess
import sys

import pytest

from lumina_jax.errors import InputError
from tests.fuzz import __main__ as fuzz


def run(tmp_path, *arguments):
    command = [sys.executable, "-m", "tests.fuzz", *arguments, f"--findings={tmp_path}"]
    return subprocess.run(command, cwd=fuzz.ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("target", ["records.example", "weights.pth", "overrides.override"])
def test_damaged_input_is_taken_or_refused(tmp_path, target):
    group, name = target.split(".")
    done = run(tmp_path, group, f"--target={name}", "--inputs=150", "--seed=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 findings" in done.stdout
    assert " 150 inputs" in done.stdout


def test_only_errors_of_our_own_are_no_findings():
    def check(given):
        raise given

    assert fuzz.try_one(check, InputError("so it is meant")) == "refused"
    assert fuzz.try_one(check, SystemExit(2)) == "refused"
    for error in (KeyError("x"), MemoryError(), SystemExit(1), RecursionError()):
        assert fuzz.try_one(check, error) is error
    assert fuzz.try_one(lambda given: None, 1) == "taken"


def test_a_crash_is_a_finding_and_its_input_is_kept(tmp_path, monkeypatch):
    """What a decoder in C may do to the process."""
    crash = tmp_path / "crash.py"
    crash.write_text(
        "import os, sys\n"
        "folder = [word for word in sys.argv if word.startswith('--findings=')][0][11:]\n"
        "open(folder + '/x.y.report', 'w').write('{\"taken\": 5}')\n"
        "open(folder + '/x.y.current', 'w').write('the input')\n"
        "os.abort()\n"
    )
    real = subprocess.run

    def dies(command, **settings):
        return real([sys.executable, str(crash), *command[3:]], **settings)

    monkeypatch.setattr(subprocess, "run", dies)
    counts = fuzz.run_process("x.y", 100, 3, tmp_path)
    assert (counts.taken, counts.findings) == (5, 1)
    assert (tmp_path / "x.y.crash-3").read_text() == "the input"
