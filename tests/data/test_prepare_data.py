"""The command as a user runs it: from the root of the repository, as a file."""

import pathlib
import subprocess
import sys

from lumina_jax.data.records import Manifest

ROOT = pathlib.Path(__file__).parents[2]


def prepare_data(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/prepare_data.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_it_writes_a_dataset_and_says_what_it_wrote(tmp_path):
    output = tmp_path / "few"
    done = prepare_data(
        "openmoji", f"--output={output}", "--emojis=🐶🇩🇪", "--buckets=48x48,60x36,36x60"
    )
    assert done.returncode == 0, done.stderr
    assert f"2 records of openmoji in {output}" in done.stdout
    assert "60x36" in done.stdout
    assert "License: CC BY-SA 4.0" in done.stdout
    assert Manifest.load(output).num_records == 2


def test_bad_input_is_one_line_and_status_two(tmp_path):
    for arguments, message in [
        (["openmoji", f"--output={tmp_path}", "--emojis=🐶dog"], "no drawing of 'dog'"),
        (["openmoji", f"--output={tmp_path}", "--buckets=48*48"], "Write width x height"),
        (["openmoji"], "Missing --output"),
        (["photos"], "name one of openmoji"),
    ]:
        done = prepare_data(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_help_shows_an_example():
    done = prepare_data("--help")
    assert "python tools/prepare_data.py openmoji --output=" in done.stdout + done.stderr
    assert "--pixels_per_token" in done.stdout + done.stderr
