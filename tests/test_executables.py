"""Programs that are kept: used again without a trace, and never when anything is different."""

import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from lumina_jax import executables, sharding
from lumina_jax.executables import Program

ROOT = pathlib.Path(__file__).parents[1]


class State(NamedTuple):
    weights: dict
    count: jax.Array


class Result(NamedTuple):
    noise: jax.Array


@pytest.fixture
def cache(tmp_path):
    """An empty folder of kept programs; what JAX itself compiled stays where conftest put it."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "programs"
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def warnings(monkeypatch):
    """What the log warns of."""
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


@pytest.fixture
def mesh():
    return sharding.make_mesh(replica=1, data=8, model=1)


def make_step(mesh, traces, **settings):
    """What a train step has: named tuples, a typed key, a donated and split state."""
    split, whole = sharding.named(mesh, ("act_batch",)), sharding.named(mesh, ())

    def step(state, batch, key):
        traces.append(1)
        noise = jax.random.normal(key, batch.shape)
        weights = {"a": state.weights["a"] + jnp.mean(batch + noise, axis=1)}
        return State(weights, state.count + 1), {"loss": jnp.sum(weights["a"])}

    out = State({"a": split}, whole), whole
    return Program(
        step, name="step", settings=lambda: settings, donate_argnums=0, out_shardings=out
    )


def arguments(mesh, width=4):
    split = sharding.named(mesh, ("act_batch",))
    weights = jax.device_put(jnp.arange(16.0), split)
    batch = jax.device_put(jnp.ones((16, width)), split)
    count = jax.device_put(jnp.zeros((), jnp.int32), sharding.named(mesh, ()))
    return State({"a": weights}, count), batch, jax.random.key(3)


def test_a_kept_program_is_not_traced_again_and_does_the_same(mesh, cache):
    traces, args = [], arguments(mesh)
    first_state, first = make_step(mesh, traces)(*args)
    assert args[0].weights["a"].is_deleted()
    (file,) = cache.iterdir()
    assert file.name.startswith("step-")

    args = arguments(mesh)
    state, metrics = make_step(mesh, traces)(*args)  # as a new process would
    assert len(traces) == 1
    assert isinstance(state, State)
    assert state.weights["a"].sharding == first_state.weights["a"].sharding
    assert args[0].weights["a"].is_deleted()
    np.testing.assert_array_equal(state.weights["a"], first_state.weights["a"])
    np.testing.assert_array_equal(metrics["loss"], first["loss"])

    jax.config.update("jax_compilation_cache_dir", None)
    plain, _ = make_step(mesh, traces)(*arguments(mesh))
    assert len(traces) == 2
    np.testing.assert_array_equal(state.weights["a"], plain.weights["a"])


def test_a_program_is_made_once_for_each_shape(mesh, cache):
    traces = []
    step = make_step(mesh, traces)
    for width in (4, 6, 4):
        step(*arguments(mesh, width))
    assert (len(traces), len(step.programs), len(list(cache.iterdir()))) == (2, 2, 2)


def test_anything_that_decides_a_program_is_in_its_name(mesh, cache, monkeypatch):
    traces = []
    make_step(mesh, traces, dim=8)(*arguments(mesh))
    make_step(mesh, traces, dim=9)(*arguments(mesh))
    other = sharding.make_mesh(replica=2, data=4, model=1)
    make_step(other, traces, dim=8)(*arguments(other))
    monkeypatch.setenv("XLA_FLAGS", "--other")
    make_step(mesh, traces, dim=8)(*arguments(mesh))
    monkeypatch.setattr(executables, "_version", lambda name: f"{name} 99")
    make_step(mesh, traces, dim=8)(*arguments(mesh))
    monkeypatch.setattr(executables, "_source", lambda: "changed")
    make_step(mesh, traces, dim=8)(*arguments(mesh))
    with jax.default_matmul_precision("float32"):
        make_step(mesh, traces, dim=8)(*arguments(mesh))
    assert len(traces) == len(list(cache.iterdir())) == 7


@pytest.mark.parametrize("harm", ["cut", "changed", "empty", "foreign"])
def test_a_broken_or_foreign_file_is_told_and_made_again(mesh, cache, warnings, harm):
    traces = []
    expected, _ = make_step(mesh, traces)(*arguments(mesh))
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    if harm == "foreign":  # a sound file, of another program
        make_step(mesh, traces, dim=1)(*arguments(mesh))
        (other,) = set(cache.iterdir()) - {file}
        other.replace(file)
        traces.pop()
    else:
        changed = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        file.write_bytes({"cut": whole[:middle], "changed": changed, "empty": b""}[harm])
    state, _ = make_step(mesh, traces)(*arguments(mesh))
    assert len(traces) == 2
    (line,) = warnings
    assert "is broken, or something else; it is made again" in line
    np.testing.assert_array_equal(state.weights["a"], expected.weights["a"])
    make_step(mesh, traces)(*arguments(mesh))
    assert len(traces) == 2  # now it is sound


def test_a_folder_that_cannot_be_written_is_told(mesh, cache, warnings):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    state, _ = make_step(mesh, [])(*arguments(mesh))
    assert int(state.count) == 1
    assert any("cannot be written; the next start traces again" in line for line in warnings)


def test_a_program_that_cannot_be_kept_runs_all_the_same(cache, warnings):
    def calls_back(x):
        return jax.pure_callback(lambda y: y, jax.ShapeDtypeStruct((), "float32"), x) + 1

    program = Program(calls_back, name="calls_back", settings=dict)
    assert float(program(jnp.float32(1))) == 2
    (line,) = warnings
    assert "cannot be kept and is traced each time" in line


def test_static_arguments_and_results_of_other_types(cache):
    traces = []

    def draw(seed, *, num):
        traces.append(num)
        return Result(jax.random.normal(jax.random.key(seed), (num,)))

    for _ in range(2):
        program = Program(draw, name="draw", settings=dict, returns=(Result,))
        for num in (2, 3):
            result = program(7, num=num)
            assert isinstance(result, Result)
            expected = jax.random.normal(jax.random.key(7), (num,))
            np.testing.assert_array_equal(result.noise, expected)
    assert traces == [2, 3]


def start(dataset, workdir, cache):
    command = [
        sys.executable, "-m", "lumina_jax.train", "--config=configs/tiny.py",
        f"--workdir={workdir}", f"--config.data.directory={dataset}", "--config.train.num_steps=2",
        "--config.preview.every=0", f"--config.compile.cache_directory={cache}",
    ]  # fmt: skip
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stderr.splitlines() if "first step is done" in line)
    return line, (workdir / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_the_second_start_of_a_command_compiles_nothing(dataset, tmp_path):
    first, learned = start(dataset, tmp_path / "first", tmp_path / "cache")
    assert "; 0 read untraced" in first
    second, again = start(dataset, tmp_path / "second", tmp_path / "cache")
    assert "Programs: 0 compiled" in second
    assert "; 0 read untraced" not in second
    same = [line.split('"loss":')[1].split(",")[0] for line in (learned, again)]
    assert same[0] == same[1]


def test_a_command_without_a_cache_says_so():
    script = "from lumina_jax import executables as e; e.use_cache(''); print(e.summary())"
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    output = subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, env=environment)
    assert "No cache of programs: set JAX_COMPILATION_CACHE_DIR" in output.decode()


@pytest.fixture
def no_cache():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_programs_called_last_stay_in_memory(no_cache):
    traces = []

    def add(x, *, number):
        traces.append(number)
        return x + number

    program = Program(add, name="add", settings=dict, most=2)
    for number in (1, 2, 1, 3, 1, 2):
        assert program(jnp.ones(3), number=number)[0] == 1 + number
    assert traces == [1, 2, 3, 2]


def test_a_program_that_calls_python_is_not_written(cache, warnings):
    seen = []

    def tell(x):
        jax.debug.callback(seen.append, x)
        return x + 1

    program = Program(tell, name="tell", settings=dict, calls_host=True)
    assert program(jnp.zeros(())) == 1
    jax.effects_barrier()
    assert (seen, warnings, cache.exists()) == ([0], [], False)
