"""Ends a run that hangs, and says where: the stack of every thread, and what each process does.

A device that waits for another one waits for ever, and so does a read from a dead file server. The
loop says when it has come further; if it does not for too long, a thread writes all stacks to the
log and to `<workdir>/hangs/`, and ends the process with the status that asks for another start.

Each process tells the others what it is doing. Most of them only wait for the one that hangs, so
the message names those that came least far.
"""

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable

import jax
from absl import logging
from etils import epath

from lumina_jax import distributed, files
from lumina_jax.errors import RESTART

_WRITING = 20.0  # seconds that writing the report may take: the file system may be what hangs


class Watchdog:
    """A context in which `advance` must be called again and again.

    Args:
      workdir: Where `hangs/` goes.
      timeout: Seconds without a call after which the process is ended; 0 never ends it.
      end: Called with the exit status at the end; for tests.
    """

    def __init__(
        self, workdir: epath.PathLike, timeout: float, *, end: Callable[[int], None] = os._exit
    ):
        self._workdir, self._timeout, self._end = epath.Path(workdir), timeout, end
        self._place = (0, "start")
        self._last = time.monotonic()  # by which clock jumps are not seen
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def advance(self, step: int, doing: str) -> None:
        """The run has come further: to `doing`, in `step`."""
        self._last = time.monotonic()
        self._place = (step, doing)
        if (peers := distributed.peers()) is not None:
            peers.advance(step, doing)

    def __enter__(self) -> "Watchdog":
        if self._timeout:
            self._last = time.monotonic()
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(self._timeout / 8, 5.0)):
            if (idle := time.monotonic() - self._last) > self._timeout:
                self._bite(idle)
                return

    def _bite(self, idle: float) -> None:
        step, doing = self._place
        head = (
            f"Process {jax.process_index()} of {jax.process_count()} has not come further than "
            f"{doing!r} of step {step} for {idle:.0f} s (config.train.hang_timeout="
            f"{self._timeout:g})."
        )
        # First what can be said without asking anybody: the coordinator may be what hangs.
        logging.error("%s\n\n%s", head, stacks())
        logging.flush()
        reason = (
            f"{head} {_least_far()}The run ends with status {RESTART}; the same command goes on "
            f"from the newest checkpoint."
        )
        logging.error("%s", reason)
        name = f"step_{step:07d}_process_{jax.process_index():03d}.txt"
        writer = threading.Thread(
            target=files.write,
            args=(self._workdir / "hangs" / name, f"{reason}\n\n{stacks()}"),
            daemon=True,
        )
        writer.start()
        writer.join(_WRITING)
        if (peers := distributed.peers()) is not None:
            peers.end_all(RESTART, reason)
        self._end(RESTART)


def stacks() -> str:
    """The Python stack of every thread, the running one last."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def _least_far() -> str:
    """Names the processes that came least far, where there are several."""
    if (peers := distributed.peers()) is None:
        return ""
    try:
        places = peers.places()
    except Exception as error:  # it may be gone
        return f"The coordinator does not answer ({error}). "
    # Who trains waits for the others, through the devices.
    far = {n: (place.step, place.doing == "training") for n, place in places.items()}
    least = min(far.values(), default=None)
    last = [f"{n} ({p.doing!r} of step {p.step})" for n, p in places.items() if far[n] == least]
    return f"The processes that came least far: {', '.join(last)}. "
