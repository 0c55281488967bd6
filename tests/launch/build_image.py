"""Runs the steps of launch/Dockerfile in a folder, without root and a container engine.

Absolute paths of the image become paths below the folder, `python` is this interpreter. What a real
build does besides is to begin from another file system, and the one step that installs a Debian
package.
"""

import io
import pathlib
import re
import shlex
import shutil
import string
import subprocess
import sys

from dockerfile_parse import DockerfileParser

ROOT = pathlib.Path(__file__).parents[2]
DOCKERFILE = ROOT / "launch" / "Dockerfile"
BASE = "python:3.11-slim-bookworm@sha256:" + 64 * "0"


class StepError(Exception):
    """A RUN step ended with a status other than 0."""

    def __init__(self, done: subprocess.CompletedProcess):
        super().__init__(done.stdout + done.stderr)
        self.status = done.returncode


def instructions() -> list[tuple[str, str]]:
    """Name and value of each instruction, without comments."""
    parser = DockerfileParser(fileobj=io.BytesIO(DOCKERFILE.read_bytes()))
    steps = [(step["instruction"], step["value"]) for step in parser.structure]
    return [step for step in steps if step[0] != "COMMENT"]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage below its FROM; "" is before the first, "final" the last."""
    found, name = {"": []}, ""
    for instruction, value in instructions():
        if instruction == "FROM":
            name = value.partition(" AS ")[2] or "final"
            found[name] = []
        else:
            found[name].append((instruction, value))
    return found


def build(root: pathlib.Path, args: dict[str, str], locks: pathlib.Path, environ: dict[str, str]):
    """Runs the stage `build` below `root`; `locks` takes the place of launch/locks."""
    python = root / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    environ = {**environ, "PATH": f"{python.parent}:{environ['PATH']}"}
    for instruction, value in stages()["build"]:
        if instruction == "ARG":
            name, _, default = value.partition("=")
            environ[name] = args.get(name, default)
        elif instruction == "COPY":
            *sources, target = string.Template(value).substitute(environ).split()
            for source in sources:
                _copy(source, locks, root / target.lstrip("/"))
        elif instruction == "RUN":
            command = re.sub(r"^(--mount=\S+\s+)+", "", value)
            # Only where a path begins: not in the middle of another.
            command = re.sub(r"(?<![\w./-])/(opt|app|locks)\b", rf"{root}/\1", command)
            done = subprocess.run(
                ["/bin/sh", "-c", command], cwd=root, env=environ, capture_output=True, text=True
            )
            if done.returncode:
                raise StepError(done)
        else:
            raise ValueError(f"{instruction}: teach tests/launch/build_image.py what it does.")


def _copy(source: str, locks: pathlib.Path, target: pathlib.Path) -> None:
    path = pathlib.PurePath(source)
    found = locks / path.name if path.parent.name == "locks" else ROOT / path
    if found.is_dir():
        shutil.copytree(found, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    else:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(found, target)
