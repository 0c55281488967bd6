"""Programs that outlive the process: a restart neither traces nor compiles them.

Two things are kept in one directory. Who can write there decides what runs here, so it is for those
to whom you would give a shell:

    <directory>/               JAX's compilation cache: from the program to machine code
    <directory>/programs/      `jax.export`: from Python to the program, so that it is not traced
"""

import collections
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from etils import epath
from jax import export

from lumina_jax import distributed, files
from lumina_jax.errors import is_of_storage

_MAGIC = b"lumina_jax program 1"
# What traces, and what a program is written for.
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "einops", "numpy")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Attention of cuDNN promises no stability from one version to the next, and a trace is read by the
# version alone that wrote it.
_ALLOWED = [
    export.DisabledSafetyCheck.custom_call(name)
    for name in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
]
# Settings of JAX that change no program, or differ between the processes of a run.
_IRRELEVANT = ("address", "cache", "log", "dump", "traceback", "visible_devices", "profiler")

_REQUESTS = "/jax/compilation_cache/compile_requests_use_cache"
_HITS = "/jax/compilation_cache/cache_hits"
_SAVED = "/jax/compilation_cache/compile_time_saved_sec"
_READ = "/jax/compilation_cache/cache_retrieval_time_sec"
_COMPILE = "/jax/core/compile/backend_compile_duration"

_counts: collections.Counter = collections.Counter()


def use_cache(directory: str, *, default: str | None = None) -> None:
    """Keeps what is compiled from here on, and counts it.

    Args:
      directory: A local folder or a bucket that all processes see; process 0 alone writes. Empty:
        where JAX_COMPILATION_CACHE_DIR says.
      default: Where it says nothing; None keeps nothing.
    """
    if directory := directory or jax.config.jax_compilation_cache_dir or default:
        jax.config.update("jax_compilation_cache_dir", directory)
    # The many small programs of the buckets too: each is quick, all of them are minutes.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Traces are read by the version that wrote them, so they need not be written for older ones.
    jax.config.update("jax_export_ignore_forward_compatibility", True)
    if files.is_remote(jax.config.jax_compilation_cache_dir or ""):
        # XLA's own cache, of tuned GPU kernels, is for local folders.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    _count()


@functools.cache
def _count() -> None:
    def event(name, **_):
        _counts[name] += 1

    def duration(name, seconds, **_):
        _counts[name] += seconds

    jax.monitoring.register_event_listener(event)
    jax.monitoring.register_event_duration_secs_listener(duration)


def summary() -> str:
    """What has been compiled since `use_cache`, and what the caches saved."""
    if not jax.config.jax_compilation_cache_dir:
        return "No cache of programs: set JAX_COMPILATION_CACHE_DIR to keep them."
    hits, compiled = _counts[_HITS], _counts[_REQUESTS] - _counts[_HITS]
    return (
        f"Programs: {compiled:.0f} compiled in {_counts[_COMPILE] - _counts[_READ]:.1f} s, "
        f"{hits:.0f} from the cache in {_counts[_READ]:.1f} s ({_counts[_SAVED]:.0f} s saved); "
        f"{_counts['kept']} read untraced. Cache: {jax.config.jax_compilation_cache_dir}"
    )


class Program:
    """`jax.jit` of a function, whose trace is kept where there is a compilation cache.

    A kept trace is used only if everything that decides it is the same: the source of this
    package, the versions of the libraries, flags, settings, devices, shapes and shardings. One that
    is broken is told in the log, and made again.
    """

    def __init__(
        self,
        function: Callable,
        *,
        name: str,
        settings: Callable[[], Any],
        returns: tuple[type, ...] = (),
        calls_host: bool = False,
        most: int | None = None,
        **jit,
    ):
        """Wraps a function; nothing is traced yet.

        Args:
          function: Pure; its keyword arguments are static and have a telling `repr`.
          name: Of the program, in profiles and files.
          settings: Gives, for JSON, what the function closes over; asked for before a trace.
          returns: Named tuples that it returns and does not take.
          calls_host: It calls Python, which no file can keep: it is traced in each process.
          most: How many programs stay in memory, those called last; None keeps all.
          **jit: Of `jax.jit`: `donate_argnums`, `out_shardings`.
        """
        self._function, self._name, self._settings, self._jit = function, name, settings, jit
        self._calls_host, self._most = calls_host, most
        for kind in returns:
            _register(kind)
        self.programs: dict[Any, Callable] = {}  # by shapes and static arguments

    def __call__(self, *args, **static):
        key = (*map(jax.typeof, jax.tree.leaves(args)), *sorted(static.items()))
        program = self.programs.pop(key, None) or self._first(args, static)
        self.programs[key] = program  # the last of them
        if self._most is not None and len(self.programs) > self._most:
            del self.programs[next(iter(self.programs))]
        return program(*args)

    def lower(self, *args, **static) -> jax.stages.Lowered:
        """Traced for these shapes and shardings, to be compiled by the caller."""
        return self._jitted(static).lower(*args)

    def compile(self, *args, **static) -> jax.stages.Compiled:
        """What a call with these shapes and shardings would run, kept where the call keeps it."""
        return self._prepare(args, static).lower(*args).compile()

    def _first(self, args, static):
        """What a call runs, compiled on every process that takes part in it.

        One that read it from the cache would otherwise wait inside the program for those that
        compile, and Gloo gives them 30 seconds (NCCL ten minutes) to come.
        """
        program = self._prepare(args, static)
        shardings = {x.sharding for x in jax.tree.leaves(args) if isinstance(x, jax.Array)}
        processes = {d.process_index for sharding in shardings for d in sharding.device_set}
        if len(processes) == jax.process_count() > 1:  # all take part, so all come here
            program.lower(*args).compile()  # `program` calls what this has made
            distributed.meet(f"compiled {self._name}")
        return program

    def _jitted(self, static):
        # A function of its own: what JAX made of it goes when it goes, that of a partial stays.
        def function(*args):
            return self._function(*args, **static)

        function.__name__ = self._name
        return jax.jit(function, **self._jit)

    def _prepare(self, args, static):
        jitted = self._jitted(static)
        if self._calls_host or not jax.config.jax_compilation_cache_dir:
            return jitted
        _register_all(args)
        key = hashlib.sha256(self._description(args, static).encode()).hexdigest()
        directory = epath.Path(jax.config.jax_compilation_cache_dir) / "programs"
        path = directory / f"{self._name}-{key}"
        if (exported := _read(path, key)) is None:
            try:
                traced = export.export(jitted, disabled_checks=_ALLOWED)(*args)
                data = bytes(traced.serialize())
            # Calls of Python, or into a library that promises no stability.
            except (ValueError, NotImplementedError) as error:
                logging.warning("%s cannot be kept and is traced each time: %s", path.name, error)
                return jitted
            if jax.process_index() == 0:
                _write(path, key, data)
            # The same way as next time, so that the compilation cache meets the same program.
            exported = export.deserialize(bytearray(data))

        def call(*args):
            return exported.call(*args)

        call.__name__ = self._name
        return jax.jit(call, **self._jit)

    def _description(self, args, static) -> str:
        """Everything that decides the trace."""
        device = jax.devices()[0]
        leaves = [f"{jax.typeof(x)} {getattr(x, 'sharding', None)}" for x in jax.tree.leaves(args)]
        return json.dumps(
            {
                "source": _source(),
                "versions": [_version(name) for name in _PACKAGES] + [platform.python_version()],
                "flags": [os.environ.get(name) for name in _FLAGS],
                "jax": {
                    name: str(value)
                    for name, value in sorted(jax.config.values.items())
                    if not any(word in name for word in _IRRELEVANT)
                },
                "devices": [
                    device.platform, device.device_kind, jax.device_count(), jax.process_count(),
                ],
                "mesh": str(jax.sharding.get_abstract_mesh()),
                "name": self._name,
                "settings": self._settings(),
                "static": repr(sorted(static.items())),
                "jit": str(self._jit),
                "arguments": [str(jax.tree.structure(args)), *leaves],
            },
            sort_keys=True,
            default=str,
        )  # fmt: skip


def _read(path: epath.Path, key: str) -> export.Exported | None:
    """A kept trace; None where there is none, or none that can be used."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except Exception as error:
        if not is_of_storage(error):
            raise
        logging.warning("%s cannot be read and is traced again: %s", path, error)
        return None
    head, data = content[: len(_header(key, b""))], content[len(_header(key, b"")) :]
    if head != _header(key, data):
        logging.warning("%s is broken, or something else; it is made again.", path)
        return None
    exported = export.deserialize(bytearray(data))
    _counts["kept"] += 1
    return exported


def _write(path: epath.Path, key: str, data: bytes) -> None:
    try:
        files.write(path, _header(key, data) + data)
    except Exception as error:
        if not is_of_storage(error):
            raise
        logging.warning("%s cannot be written; the next start traces again: %s", path, error)


def _header(key: str, data: bytes) -> bytes:
    return b"\n".join([_MAGIC, key.encode(), hashlib.sha256(data).hexdigest().encode(), b""])


@functools.cache
def _source() -> str:
    """A fingerprint of this package."""
    digest = hashlib.sha256()
    package = pathlib.Path(__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {name}"


def _register_all(tree: Any) -> None:
    """Names the named tuples of a tree, so that a file can speak of them."""

    def visit(node):
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            _register(type(node))
        return False

    jax.tree.leaves(tree, is_leaf=visit)


@functools.cache
def _register(kind: type) -> None:
    name = f"{kind.__module__}.{kind.__qualname__}"
    export.register_namedtuple_serialization(kind, serialized_name=name)
