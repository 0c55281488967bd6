"""One run in a workdir: a file that names its holder, who writes it anew every few seconds.

A crash leaves the file behind. Whoever finds it asks first whether the holder's process still
exists, which can be known on the holder's own machine; elsewhere it watches whether the file still
changes. No clock is compared with that of another host, and no file system needs to know locks: a
bucket will do.

A holder that finds another's name in its file has been taken for dead, and stops.
"""

import dataclasses
import json
import os
import pathlib
import socket
import threading
import time
import uuid

from absl import logging
from etils import epath

from lumina_jax import files
from lumina_jax.errors import InputError, RestartError

FILE = "run.lock"
_RENEW = 10.0  # seconds between two renewals
_PATIENCE = 45.0  # seconds without one after which the holder counts as dead
_SETTLE = 2.0  # seconds for another one, who takes it at the same moment, to show


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that holds a workdir.

    Attributes:
      token: Its own name, never used again.
      count: Of its renewals.
      host: For people.
      pid: Likewise.
      machine: The same for processes that can see each other.
      birth: When the process began, in the machine's own ticks; a number may be used again.
    """

    token: str
    count: int
    host: str
    pid: int
    machine: str
    birth: int

    @classmethod
    def myself(cls) -> "Holder":
        pid = os.getpid()
        return cls(uuid.uuid4().hex, 0, socket.gethostname(), pid, _machine(), _birth(pid) or 0)

    def fate(self) -> bool | None:
        """Whether the process exists; None where that cannot be known from here."""
        if self.machine != _machine() or not self.machine:
            return None
        return _birth(self.pid) == self.birth


def holder(workdir: epath.PathLike) -> Holder | None:
    """Who holds a workdir, alive or not; None where nobody does, or what is there is no lock."""
    path = epath.Path(workdir) / FILE
    try:
        return Holder(**json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError):
        logging.warning("%s is not a lock and is written anew.", path)
        return None


class Lease:
    """The right to write to a workdir, while the context is entered.

    Args:
      workdir: Local or on a bucket.
      renew: Seconds between renewals.
      patience: Seconds without a renewal after which a holder elsewhere counts as dead.
      settle: Seconds after which a name that was written stays, if nobody else wrote at that time.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        renew: float = _RENEW,
        patience: float = _PATIENCE,
        settle: float = _SETTLE,
    ):
        self._path = epath.Path(workdir) / FILE
        self._renew, self._patience, self._settle = renew, patience, settle
        self._me = Holder.myself()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._lost: Holder | None = None

    def __enter__(self) -> "Lease":
        if not self._create():
            self._wait_for_the_dead()
            self._write()
            time.sleep(self._settle)
            if (other := holder(self._path.parent)) != self._me:
                raise self._taken(other)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        try:
            if not self._is_taken():
                self._path.unlink(missing_ok=True)
        except Exception as error:  # of a store; it must not hide how the run ended
            logging.warning("%s stays: %s", self._path, error)

    def check(self, *, now: bool = False) -> None:
        """Raises a RestartError if another run has taken the workdir meanwhile.

        It is looked up every few seconds; with `now` also at once.
        """
        if self._lost or (now and self._is_taken()):
            raise RestartError(
                f"{self._path} now names process {self._lost.pid} on {self._lost.host}: this run "
                f"did not renew it for over {self._patience:g} s (a machine asleep? storage that "
                f"did not answer?), and another one took {self._path.parent}. This one ends "
                f"without saving. Started again it waits its turn."
            )

    def _is_taken(self) -> bool:
        if (found := holder(self._path.parent)) and found.token != self._me.token:
            self._lost = found
        return self._lost is not None

    def _create(self) -> bool:
        """Takes a workdir that nobody holds; False where a file is there, or was a moment ago."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if files.is_remote(self._path):  # not every store can create a file only if it is new
            return False
        aside = pathlib.Path(f"{self._path}.{self._me.token}")
        aside.write_text(self._text())
        try:
            os.link(aside, self._path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            return False
        finally:
            aside.unlink()
        return True

    def _wait_for_the_dead(self) -> None:
        """Returns when nobody holds the workdir; raises where somebody does."""
        first = holder(self._path.parent)
        if first is None or (fate := first.fate()) is False:
            return
        if fate:
            raise self._taken(first)
        logging.info(
            "%s names process %d on %s, which cannot be seen from here. Waiting up to %g s to see "
            "whether it still runs.", self._path, first.pid, first.host, self._patience,
        )  # fmt: skip
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            time.sleep(min(self._renew / 4, 1.0))
            if (found := holder(self._path.parent)) is None:
                return
            if found != first:
                raise self._taken(found)
        logging.info("It has not changed: its run is dead, and this one takes its place.")

    def _taken(self, holder: Holder | None) -> InputError:
        who = f"process {holder.pid} on {holder.host}" if holder else "another process"
        return InputError(
            f"{self._path.parent} is in use: {who} runs there, by {self._path.name}. Wait for it "
            f"or stop it, or give another --workdir."
        )

    def _keep(self) -> None:
        while not self._stop.wait(self._renew):
            try:
                if self._is_taken():
                    return
                self._me = dataclasses.replace(self._me, count=self._me.count + 1)
                self._write()
            except Exception as error:  # whatever a store may raise; the next time it may answer
                logging.warning("%s cannot be renewed: %s", self._path, error)

    def _text(self) -> str:
        return json.dumps(dataclasses.asdict(self._me)) + "\n"

    def _write(self) -> None:
        files.write(self._path, self._text())


def _birth(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine did; None if there is none."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rsplit(")", 1)[1].split()
    return None if state == "Z" else int(fields[18])  # field 22 of all


def _machine() -> str:
    """Names this boot of this machine, and the container; "" where that cannot be known."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
