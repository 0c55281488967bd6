"""The image: launch/Dockerfile, .dockerignore and launch/locks, without a container engine."""

import hashlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement

from lumina_jax.errors import InputError
from tests.launch import build_image
from tests.launch.build_image import BASE, DOCKERFILE, ROOT, StepError
from tools import lock

IGNORE = ROOT / ".dockerignore"


# --- the Dockerfile


def values(name, stage=None):
    steps = build_image.instructions() if stage is None else build_image.stages()[stage]
    return [value for instruction, value in steps if instruction == name]


def test_hadolint_finds_nothing():
    hadolint = pathlib.Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_base_is_the_builders_choice_and_all_else_is_a_stage_of_this_file():
    assert values("ARG", "") == ["BASE", "VARIANT"]  # no defaults
    stages = list(build_image.stages())[1:]
    for value in values("FROM"):
        source = value.partition(" AS ")[0]
        assert source in ("${BASE}", "runtime-${VARIANT}", *stages)


def test_every_variant_has_a_stage_a_lock_and_a_line_in_the_usage():
    variants = {name.removeprefix("runtime-") for name in build_image.stages() if "-" in name}
    assert variants == set(lock.VARIANTS)
    assert {path.stem for path in lock.FOLDER.iterdir()} == {lock.BUILD, *variants}
    usage = re.search(r"#   VARIANT .*", DOCKERFILE.read_text())[0]
    assert all(re.search(rf"\b{variant}\b", usage) for variant in variants)


def test_a_container_is_nobody_behind_tini_and_no_shell():
    (user,) = values("USER")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)  # by number, or runAsNonRoot cannot tell
    assert json.loads(*values("ENTRYPOINT")) == ["tini", "--"]
    assert json.loads(*values("CMD"))[:2] == ["python", "-m"]


def test_nothing_comes_in_but_the_checkout_the_packages_of_a_lock_and_tini():
    assert not values("ADD")
    assert not re.search(r"https?:|\bcurl\b|\bwget\b|\bgit\b", "\n".join(values("RUN")))
    for step in re.findall(r"pip install.*", "\n".join(values("RUN"))):
        assert "--require-hashes --no-deps" in step
    # The one step that build_image cannot run: it needs root and Debian.
    others = [name for name in build_image.stages() if name != "build" and values("RUN", name)]
    assert others == ["runtime"]
    assert values("RUN", "runtime")[0].count("apt-get install") == 1


def test_no_secret_can_be_given_to_a_build():
    given = "\n".join(values("ARG") + values("ENV"))
    names = re.findall(r"^(\w+)|\s(\w+)=", given, re.MULTILINE)
    assert {"BASE", "PYTHONPATH"} <= {name for pair in names for name in pair}
    assert not re.search(r"token|secret|passw|key|credential|auth", given, re.IGNORECASE)


# --- what a build may see


def ignored(path):
    """Whether .dockerignore keeps `path` out, by Docker's rules: the last match decides."""
    verdict = False
    for line in IGNORE.read_text().splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        regex = ""
        for part in re.findall(r"\*\*/?|\*|\?|[^*?]+", pattern):
            wild = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
            regex += wild.get(part, re.escape(part))
        if re.fullmatch(f"{regex}(/.*)?", path):  # a folder brings what is in it
            verdict = not line.startswith("!")
    return verdict


@pytest.mark.parametrize(
    "path",
    [
        ".env",
        ".git/config",
        ".venv/bin/python",
        "compiled/program",
        "configs/__pycache__/base.cpython-311.pyc",
        "data/openmoji/00000.array_record",
        "docs/plans.png",
        "key.json",
        "launch/.env",
        "launch/gke/.secrets/token",
        "launch/gke/service_account.json",
        "lumina_jax.egg-info/PKG-INFO",
        "launch/tls.pem",
        "my_project.yaml",
        "runs/tiny/checkpoints/1/state",
        "tests/launch/project.yaml",
        "tools/id.key",
    ],
)
def test_a_build_never_sees(path):
    assert ignored(path)


def test_every_source_of_a_copy_is_there_and_seen():
    sources = [value.split()[:-1] for value in values("COPY") if "--from=" not in value]
    for source in [name for names in sources for name in names]:
        for variant in lock.VARIANTS:
            path = source.replace("${VARIANT}", variant)
            assert (ROOT / path).exists()
            assert not ignored(path)
    shown = re.findall(r"^!(\S+)$", IGNORE.read_text(), re.MULTILINE)
    assert set(shown) == {path.split("/")[0] for names in sources for path in names}


def test_a_build_sees_all_that_the_commands_import():
    files = [path for folder in ("configs", "lumina_jax", "tools") for path in walk(ROOT / folder)]
    assert len(files) > 100
    assert not [path for path in files if ignored(path)]


def walk(folder):
    found = (path for path in folder.rglob("*") if path.suffix in (".py", ".toml", ".flags"))
    return [path.relative_to(ROOT).as_posix() for path in found]


# --- the locks


def locked(name):
    return lock.pins(lock.FOLDER / f"{name}.txt")


def wanted(variant):
    """The requirements of a variant: requirements.txt and its extras, with the extras they name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = re.findall(r"^[^#\s]\S*", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    pending, found = [*map(Requirement, lines)], []
    for extra in lock.VARIANTS[variant]:
        pending += map(Requirement, project["optional-dependencies"][extra])
    while pending:
        requirement = pending.pop()
        if requirement.name != project["name"]:
            found.append(requirement)
            continue
        for extra in requirement.extras:
            pending += map(Requirement, project["optional-dependencies"][extra])
    return found


@pytest.mark.parametrize("variant", list(lock.VARIANTS))
def test_a_lock_has_every_requirement_within_its_bounds(variant):
    pins = locked(variant)
    stale = [
        f"{requirement} is {pins.get(lock.normal(requirement.name))}"
        for requirement in wanted(variant)
        if pins.get(lock.normal(requirement.name)) is None
        or not requirement.specifier.contains(pins[lock.normal(requirement.name)])
    ]
    assert not stale, "`make locks` renews launch/locks"


def test_each_accelerator_gets_what_drives_it():
    assert "libtpu" in locked("tpu")
    jax = locked("cuda")["jax"]
    assert locked("cuda")["jax-cuda13-plugin"] == locked("cuda")["jax-cuda13-pjrt"] == jax
    assert "torch" in locked("caption")
    assert not {"torch", "libtpu", "jax-cuda13-plugin"} & set(locked("cpu"))


@pytest.mark.parametrize("name", lock.LOCKS)
def test_a_lock_is_names_versions_and_hashes_alone(name):
    text = (lock.FOLDER / f"{name}.txt").read_text()
    entries = re.split(r"\n(?=[^\s#])", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).strip())
    assert len(entries) == len(locked(name))
    for entry in entries:
        assert re.fullmatch(r"\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+", entry.strip())


def test_all_images_have_the_same_version_of_what_they_share():
    versions = {}
    for variant in lock.VARIANTS:
        for name, version in locked(variant).items():
            versions.setdefault(name, set()).add(version)
    # PyTorch and JAX were each built with CUDA libraries of their own time; no image has both.
    differ = {name for name, found in versions.items() if len(found) > 1}
    assert not [name for name in differ if not name.startswith("nvidia-")]


# --- tools/lock.py


def fake_uv(monkeypatch, folder, script):
    """Puts a `uv` beside the interpreter; it finds the file to write in $output."""
    uv = folder / "uv"
    uv.write_text(
        "#!/bin/sh\nfor word; do case $word in --output-file=*) output=${word#*=} ;; esac; done\n"
        + script
    )
    uv.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))


def test_a_lock_prefers_what_is_given(monkeypatch, tmp_path):
    fake_uv(monkeypatch, tmp_path, 'echo "# $*" >> "$output"')
    text = lock.compile_lock("tpu", {"numpy": "2.4.6", "jax": "0.10.2"})
    assert text.startswith("jax==0.10.2\nnumpy==2.4.6\n# ")
    assert "pyproject.toml --extra=tpu --extra=demo" in text


def test_the_build_lock_is_what_builds_this_project_and_pip(monkeypatch, tmp_path):
    fake_uv(monkeypatch, tmp_path, 'cat > "$output"')
    assert lock.compile_lock("build", {}).split() == ["pip", "setuptools>=77"]


def test_what_uv_says_is_told(monkeypatch, tmp_path):
    fake_uv(monkeypatch, tmp_path, "echo no such version >&2; exit 1")
    with pytest.raises(InputError, match="no versions for the lock tpu:\nno such version"):
        lock.compile_lock("tpu", {})


def test_a_missing_uv_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(InputError, match=r"uv is missing\. `make venv` installs it"):
        lock.compile_lock("tpu", {})


def test_what_is_installed_is_known_by_its_public_name_and_version():
    found = lock.installed()
    assert found["ml-dtypes"]  # ml_dtypes
    assert not [version for version in found.values() if "+" in version]


def test_a_lock_of_another_name_is_refused():
    done = subprocess.run(
        [sys.executable, ROOT / "tools/lock.py", "--locks=gpu"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--locks=gpu: there are build, cpu, tpu, cuda, caption." in done.stderr


# --- the steps of a build


def wheel(folder, name, module="VALUE = 1\n"):
    """A package of one module; returns its line in a lock."""
    info = f"{name}-1.0.dist-info"
    members = {
        f"{name}.py": module,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    members[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*members, f"{info}/RECORD"])
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for path, text in members.items():
            archive.writestr(path, text)
    folder.joinpath(f"{name}-1.0-py3-none-any.whl").write_bytes(data.getvalue())
    return f"{name}==1.0 --hash=sha256:{hashlib.sha256(data.getvalue()).hexdigest()}\n"


@pytest.fixture
def offline(tmp_path):
    """Locks of two made-up packages, and the environment of a pip that knows only these."""
    wheels, locks = tmp_path / "wheels", tmp_path / "locks"
    wheels.mkdir()
    locks.mkdir()
    (locks / "build.txt").write_text(wheel(wheels, "builder"))
    (locks / "cpu.txt").write_text(wheel(wheels, "packed"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environ = {**kept, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    return locks, {**environ, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def test_a_build_leaves_an_environment_and_a_compiled_checkout(offline, tmp_path):
    root = tmp_path / "root"
    build_image.build(root, {"BASE": BASE, "VARIANT": "cpu"}, *offline)
    script = "import packed, builder; print(packed.VALUE)"
    done = subprocess.run(
        [root / "opt/venv/bin/python", "-c", script], capture_output=True, text=True
    )
    assert done.stdout == "1\n"
    assert {path.name for path in (root / "app").iterdir()} == {
        *("LICENSE", "README.md", "pyproject.toml", "requirements.txt"),
        *("configs", "launch", "lumina_jax", "tools"),
    }
    sources = [path for path in (root / "app").rglob("*.py") if path.parent.name != "__pycache__"]
    compiled = [*(root / "app").rglob("*.pyc"), *root.rglob("packed.*.pyc")]
    assert len(compiled) == len(sources) + 1
    # Checked by the hash of its source, not by a time that an image does not keep: PEP 552.
    assert {path.read_bytes()[4:8] for path in compiled} == {b"\x03\0\0\0"}
    unreadable = [path for path in (root / "app").rglob("*") if not path.stat().st_mode & 0o004]
    assert not unreadable


def test_a_package_that_is_not_the_locked_one_ends_the_build(offline, tmp_path):
    wheel(tmp_path / "wheels", "packed", "VALUE = 2\n")
    with pytest.raises(StepError, match="DO NOT MATCH THE HASHES"):
        build_image.build(tmp_path / "root", {"BASE": BASE, "VARIANT": "cpu"}, *offline)


@pytest.mark.parametrize("base", ["", "python:3.11-slim-bookworm"])
def test_a_base_without_digest_ends_the_build(base, offline, tmp_path):
    message = f"BASE={base} has no digest; needed: NAME:TAG@sha256:"
    with pytest.raises(StepError, match=re.escape(message)) as raised:
        build_image.build(tmp_path / "root", {"BASE": base, "VARIANT": "cpu"}, *offline)
    assert raised.value.status == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="locks are for Python 3.11")
def test_what_a_build_with_the_real_lock_leaves_can_train(tmp_path):
    """Downloads half a gigabyte, as a build does."""
    try:
        build_image.build(tmp_path, {"BASE": BASE, "VARIANT": "cpu"}, lock.FOLDER, dict(os.environ))
    except StepError as error:
        if re.search(r"NewConnectionError|NameResolutionError|ConnectTimeout", str(error)):
            pytest.skip("needs a package registry")
        raise
    app, home = tmp_path / "app", tmp_path / "tmp"
    home.mkdir()
    environ = {"HOME": str(home), "PYTHONPATH": str(app), "JAX_PLATFORMS": "cpu"}
    environ["PATH"] = f"{tmp_path / 'opt/venv/bin'}:{os.environ['PATH']}"
    before = files(app)

    def run(*words):
        done = subprocess.run(["python", *words], cwd=app, env=environ, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()

    data = f"{home}/data"
    run(
        *("tools/prepare_data.py", "openmoji", f"--output={data}"),
        "--flagfile=configs/tiny_data.flags",
    )
    run(
        *("-m", "lumina_jax.train", "--config=configs/tiny.py", f"--workdir={home}/run"),
        *(f"--config.data.directory={data}", "--config.train.num_steps=2"),
    )
    assert files(app) == before  # nothing is written where an image is read-only


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
