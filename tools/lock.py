"""Writes launch/locks: every package of each container image, with its version and its hashes.

    make locks                        # all of them
    python tools/lock.py --locks=tpu  # one

Versions are those of the environment that runs this, so an image gets what the tests ran with. What
is not installed here, or cannot be the same there, stays as it was in the lock; --upgrade takes the
newest instead, and what is printed names it. launch/Dockerfile installs what is in a lock, checks
its hashes, and nothing else.

A lock is also the input of tools that list what is in an image:

    cyclonedx-py requirements launch/locks/tpu.txt    # of the package cyclonedx-bom
"""

import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tempfile
import tomllib

from absl import flags

from lumina_jax import cli
from lumina_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "launch" / "locks"

# Extras of pyproject.toml. PyTorch stays out of what trains: with CUDA it outweighs all the rest.
_COMMON = ("demo", "gcs", "prepare", "quantized", "web")
VARIANTS = {
    "cpu": (*_COMMON, "servers"),
    "tpu": ("tpu", *_COMMON),
    "cuda": ("cuda", *_COMMON),
    "caption": ("caption", *_COMMON),
}
BUILD = "build"  # the lock of what installs the others
LOCKS = (BUILD, *VARIANTS)

_UV = (
    *("uv", "pip", "compile", "--quiet", "--generate-hashes"),
    *("--python-version", "3.11"),
    # The oldest glibc that all wheels run on: libtpu asks for 2.31, and Debian 12 has 2.36.
    *("--python-platform", "x86_64-manylinux_2_31"),
    *("--custom-compile-command", "make locks"),
)
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)", re.MULTILINE)


def define_flags() -> None:
    flags.DEFINE_list("locks", list(LOCKS), f"Which to write: {', '.join(LOCKS)}.")
    flags.DEFINE_bool("upgrade", False, "Take the newest version of what is not installed.")


def main() -> None:
    args = flags.FLAGS
    if unknown := set(args.locks) - set(LOCKS):
        raise InputError(f"--locks={','.join(sorted(unknown))}: there are {', '.join(LOCKS)}.")
    tested = installed()
    FOLDER.mkdir(exist_ok=True)
    for name in args.locks:
        path = FOLDER / f"{name}.txt"
        kept = {} if args.upgrade else pins(path)
        # The pip of an environment is as old as its Python; an image gets a newer one.
        path.write_text(compile_lock(name, kept if name == BUILD else {**kept, **tested}))
        locked = pins(path)
        others = {key: pin for key, pin in locked.items() if tested.get(key) != pin}
        print(f"{path.relative_to(ROOT)}: {len(locked)} packages, {len(others)} not as installed")
        for key, pin in others.items():
            print(f"  {key} {pin} (here {tested.get(key, 'none')})")


def installed() -> dict[str, str]:
    """Package and version of all that is installed here."""
    # A local version, such as 2.13.0+cpu, is on no registry; its public part is.
    return {
        normal(package.name): package.version.partition("+")[0]
        for package in importlib.metadata.distributions()
    }


def pins(path: pathlib.Path) -> dict[str, str]:
    """Package and version of each line of a lock; none where there is no lock yet."""
    if not path.exists():
        return {}
    return {normal(name): version for name, version in _PIN.findall(path.read_text())}


def normal(name: str) -> str:
    """The name by which registries know a package: lower case, one hyphen for each separator."""
    return re.sub(r"[-_.]+", "-", name).lower()


def compile_lock(name: str, preferred: dict[str, str]) -> str:
    """The text of a lock; uv takes the preferred versions wherever the requirements allow them."""
    if name == BUILD:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        inputs, given = ["-"], "\n".join(["pip", *project["build-system"]["requires"]])
    else:
        inputs, given = ["pyproject.toml"], None
        inputs += [f"--extra={extra}" for extra in VARIANTS[name]]
    with tempfile.TemporaryDirectory() as folder:
        # uv reads what it prefers from the file that it is about to write.
        output = pathlib.Path(folder) / "lock.txt"
        output.write_text("".join(f"{key}=={pin}\n" for key, pin in sorted(preferred.items())))
        command = [*_UV, f"--output-file={output}", *inputs]
        command[0] = str(pathlib.Path(sys.executable).with_name("uv"))
        try:
            done = subprocess.run(command, cwd=ROOT, input=given, text=True, capture_output=True)
        except FileNotFoundError:
            raise InputError(f"{command[0]} is missing. `make venv` installs it.") from None
        if done.returncode:
            raise InputError(f"uv found no versions for the lock {name}:\n{done.stderr.strip()}")
        return output.read_text()


if __name__ == "__main__":
    define_flags()
    cli.run(main)
