"""What the processes of a run know of each other: who lives, how far each is, and how it ended.

A process that waits for another one on the devices waits for ever. So each says every few seconds,
through the coordinator, that it lives and how far it is. Process 0 notices who has fallen silent.
Whoever knows that the run cannot go on, because one is lost, hangs or has failed, says so once: the
verdict. All end by it, with the same exit status, in the time of two signs of life.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from absl import logging

from lumina_jax.errors import RESTART

_BEATS = 6  # signs of life in the time after which a silent process is lost
_ROOM = "lumina_jax/peers"
_DAY = 24 * 3600  # longer than any wait that is not a hang


@runtime_checkable
class Store(Protocol):
    """Of the coordinator: jax's DistributedRuntimeClient."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...

    def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int) -> None: ...


class Progress(NamedTuple):
    """A sign of life: its number, and how far the process is."""

    count: int
    step: int
    doing: str


class Verdict(NamedTuple):
    """Why the run ends, and the exit status of all its processes."""

    status: int
    reason: str


class Peers:
    """Watches over the processes of a run, in a thread of its own; close it at the end.

    Args:
      store: That all of them see.
      process: The number of this one.
      num_processes: How many there are.
      name: The name of a process, for messages.
      lost_timeout: Seconds of silence after which a process is lost.
      end: Called with the exit status; for tests.
    """

    def __init__(
        self,
        store: Store,
        process: int,
        num_processes: int,
        *,
        name: Callable[[int], str] = str,
        lost_timeout: float,
        end: Callable[[int], None] = os._exit,
    ):
        self._store, self._process, self._num_processes = store, process, num_processes
        self._name, self._lost_timeout, self._end = name, lost_timeout, end
        self._period = lost_timeout / _BEATS
        self._count, self._place = 0, (0, "start")
        self._meetings = 0
        self._heard: dict[int, tuple[int, float]] = {}  # the newest count, and when it was heard
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def advance(self, step: int, doing: str) -> None:
        """This process has come further."""
        self._place = step, doing

    def meet(self, name: str) -> None:
        """Returns when every process has called this as often as this one."""
        self._meetings += 1
        self._store.wait_at_barrier(f"{_ROOM}/{self._meetings} {name}", 1000 * _DAY)

    def places(self) -> dict[int, Progress]:
        """How far each process was at its last sign of life."""
        found = self._store.key_value_dir_get(f"{_ROOM}/places/")
        return {int(key.rsplit("/", 1)[1]): Progress(*json.loads(text)) for key, text in found}

    def end_all(self, status: int, reason: str) -> None:
        """Ends every process of the run with this status, this one too; does not return."""
        try:
            # The first verdict stands: what fails next, fails because of it.
            self._store.key_value_set(f"{_ROOM}/verdict/0", json.dumps([status, reason]))
        except Exception as error:  # there is one already, or the coordinator is gone
            logging.info("%s", error)
            with contextlib.suppress(Exception):
                status = (self._verdict() or Verdict(status, reason)).status
        self._leave(status)

    def wait_for_verdict(self) -> None:
        """Gives the time in which a lost process is noticed, and this one ended for it."""
        if self._num_processes > 1:
            time.sleep(self._lost_timeout + 3 * self._period)

    def close(self) -> None:
        """This process is done, and its silence is no sign of anything."""
        self._stop.set()
        self._thread.join()
        self._place = (self._place[0], "done")
        self._beat()

    def _watch(self) -> None:
        while not self._stop.wait(self._period):
            try:
                self._beat()
                if verdict := self._verdict():
                    logging.error(
                        "%s This process ends too, with status %d.", verdict.reason, verdict.status
                    )
                    self._leave(verdict.status)
                    return
                if self._process == 0 and (lost := self._lost()):
                    who = ", ".join(map(self._name, lost))
                    reason = (
                        f"Process {who} of {self._num_processes} gave no sign of life for "
                        f"{self._lost_timeout:g} s (--lost_timeout). Start all again with the same "
                        f"command: the run goes on from its newest checkpoint."
                    )
                    logging.error("%s", reason)
                    self.end_all(RESTART, reason)
                    return
            except Exception as error:  # JAX itself ends those who lose the coordinator
                logging.warning("The coordinator does not answer: %s", error)

    def _beat(self) -> None:
        self._count += 1
        place = json.dumps([self._count, *self._place])
        self._store.key_value_set(f"{_ROOM}/places/{self._process}", place, allow_overwrite=True)

    def _verdict(self) -> Verdict | None:
        for _, text in self._store.key_value_dir_get(f"{_ROOM}/verdict/"):
            return Verdict(*json.loads(text))
        return None

    def _lost(self) -> list[int]:
        """Those whose count did not change for too long, by this process's own clock."""
        now, places = time.monotonic(), self.places()
        for process in range(self._num_processes):
            count = places[process].count if process in places else 0
            if self._heard.get(process, (-1, now))[0] != count:
                self._heard[process] = count, now
        return [
            process
            for process, (_, heard) in self._heard.items()
            if now - heard > self._lost_timeout
            and not (process in places and places[process].doing == "done")
        ]

    def _leave(self, status: int) -> None:
        if self._process == 0:
            # It is the coordinator: until all have read the verdict it must be there.
            time.sleep(2 * self._period)
        logging.flush()
        self._end(status)
