"""Where the time of a run goes, over all its starts: into steps, or lost to what.

    step         steps that are part of the model
    start        from the beginning of the process to the first step, but for what follows
    compile      tracing, lowering and compiling, or reading programs from the cache, at any time
    data         the devices had nothing to do because the next batch was not there
    save         the loop stood still for a checkpoint
    restore      reading one
    preview      sample pictures
    validation   validation loss
    repeated     steps computed once more, because they came after the newest checkpoint
    down         from the last sign of life of one start to the beginning of the next, as far as the
                 clock tells
    other        the rest, such as writing a profile

Each moment is of one class, so the classes add up to the time since the first start began. Goodput
is the share of `step`. The account is what process 0 sees; it is kept in the workdir, written whole
at every line of the log, so of a killed run only what it did after its last line is not known: that
is `down`.
"""

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath

from lumina_jax import files
from lumina_jax.errors import InputError

FILE = "goodput.json"
LOSSES = (
    "start", "compile", "data", "save", "restore", "preview", "validation", "repeated", "down",
    "other",
)  # fmt: skip
CLASSES = ("step", *LOSSES)

_COMPILING = "/jax/core/compile/"  # the events of tracing, lowering and compiling; they nest
_STEPPING = ("start", "step", "repeated", "data")  # the loop is at its work


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of a run.

    Attributes:
      began: Seconds since 1970.
      last_step: The newest step that is known to be computed.
      seconds: By class, without `down`.
    """

    began: float
    last_step: int
    seconds: dict[str, float]

    @property
    def ended(self) -> float:
        """Its last sign of life, in seconds since 1970."""
        return self.began + sum(self.seconds.values())


class Account:
    """The time of this start, and that of those before it; of use to the thread that made it.

    It is a context, which ends the account.

    Args:
      path: The file of the run. It is written only when a step has been begun.
      began: When this start began, in seconds since 1970; by default now.
    """

    def __init__(self, path: epath.PathLike, *, began: float | None = None):
        self._path = epath.Path(path)
        self._active = jax.process_index() == 0
        self._earlier = read(self._path) if self._active else []
        now, self._mark = time.time(), time.perf_counter()
        self._began = now if began is None else began
        if self._earlier:  # two starts in one process, or clocks that differ
            self._began = min(now, max(self._began, self._earlier[-1].ended))
        self._reached = max((start.last_step for start in self._earlier), default=0)
        self._seconds = dict.fromkeys(CLASSES, 0.0)
        del self._seconds["down"]
        self._seconds["start"] = now - self._began
        self._class, self._last_step = "start", 0
        self._thread = threading.get_ident()
        self._compiled: list[tuple[float, float]] = []  # when it began, how long it took

    def __enter__(self) -> "Account":
        jax.monitoring.register_event_time_span_listener(self._on_span)
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        jax.monitoring.unregister_event_time_span_listener(self._on_span)
        if not self._last_step:
            return
        try:
            self.write(self._last_step)
        except Exception as error:
            if kind is None:
                raise
            logging.warning("%s cannot be written: %s", self._path, error)  # what ended it matters

    def begin_step(self, step: int) -> None:
        """From here on time is that of `step`, the first being 1, unless it is spent otherwise."""
        self._switch("repeated" if step <= self._reached else "step")

    @contextlib.contextmanager
    def spending(self, name: str) -> Iterator[None]:
        """What happens inside is of this class."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def move(self, seconds: float, name: str) -> None:
        """Counts time of the class that is running, which is over by now, to another one."""
        self._seconds[self._class] -= seconds
        self._seconds[name] += seconds

    def interruptions(self) -> float:
        """The seconds so far that were spent on neither steps nor their data."""
        return sum(s for name, s in self._seconds.items() if name not in _STEPPING)

    def write(self, step: int) -> None:
        """Keeps the account; `step` is the newest that is computed."""
        self._last_step = step
        if self._active:
            starts = [dataclasses.asdict(start) for start in self._starts()]
            files.write(self._path, json.dumps({"starts": starts}, indent=1) + "\n")

    def scalars(self) -> dict[str, float]:
        """`goodput` and `lost/<class>`, as shares of all time so far; their sum is 1."""
        found = totals(self._starts())
        wall = sum(found.values())
        return {"goodput": found["step"] / wall} | {
            f"lost/{name}": found[name] / wall for name in LOSSES
        }

    def table(self) -> str:
        """The classes with their seconds and shares, the largest first."""
        starts = self._starts()
        found = totals(starts)
        wall = sum(found.values())
        lines = [
            f"{len(starts)} start(s), {wall:.1f} s, of which steps are {found['step'] / wall:.1%}"
        ]
        for name in sorted(found, key=found.get, reverse=True):
            if found[name]:
                lines.append(f"  {name:<10} {found[name]:>12.1f} s  {found[name] / wall:>6.1%}")
        return "\n".join(lines)

    def _starts(self) -> list[Start]:
        self._switch(self._class)
        return [*self._earlier, Start(self._began, self._last_step, dict(self._seconds))]

    def _switch(self, name: str) -> str:
        now = time.perf_counter()
        self._seconds[self._class] += now - self._mark
        outer, self._class, self._mark = self._class, name, now
        return outer

    def _on_span(self, event: str, start: float, end: float, **_) -> None:
        """Moves what JAX says of compiling here; what goes on in other threads holds nothing up."""
        if not event.startswith(_COMPILING) or threading.get_ident() != self._thread:
            return
        inner = 0.0  # a function is traced while the one that calls it is
        while self._compiled and self._compiled[-1][0] >= start:
            inner += self._compiled.pop()[1]
        self._compiled.append((start, end - start))
        self._switch(self._class)
        # JAX measures by the clock on the wall, which may jump meanwhile.
        self.move(min(max(end - start - inner, 0.0), self._seconds[self._class]), "compile")


def read(path: epath.PathLike) -> list[Start]:
    """The starts of a run, in order; none where there is no file yet."""
    path = epath.Path(path)
    if not path.exists():
        return []
    try:
        return [Start(**start) for start in json.loads(path.read_text())["starts"]]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} is not the account of a run's time ({error}). Remove it: the account then "
            f"begins anew."
        ) from error


def totals(starts: list[Start]) -> dict[str, float]:
    """The seconds of each class, over all starts and what lies between them."""
    found = {name: sum(s.seconds.get(name, 0.0) for s in starts) for name in CLASSES}
    found["down"] = 0.0
    latest = starts[0].ended if starts else 0.0
    for start in starts[1:]:  # the clock may have been set back for one of them
        found["down"] += max(start.began - latest, 0.0)
        latest = max(latest, start.ended)
    return found


def process_start() -> float:
    """When this process began, in seconds since 1970: before Python read its first module."""
    try:
        stat = epath.Path("/proc/self/stat").read_text()
    except OSError:  # not Linux
        return _IMPORTED
    # After the name, which may hold anything: field 22, the clock ticks from boot to its beginning.
    ticks = int(stat.rsplit(")", 1)[1].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age


_IMPORTED = time.time()
