"""The roll of a run's processes, called before JAX joins them.

JAX ends a process that waited in vain without saying for whom. So process 0 listens at the
coordinator's address, which JAX takes over afterwards. Every other process calls it, says who it is
and waits for the word, one line of JSON each way:

    {"process": 2, "num_processes": 8, "host": "host-2"}  ->  {"fault": null}
"""

import dataclasses
import json
import os
import selectors
import socket
import time

from absl import logging

from lumina_jax.errors import InputError, JoinError, listed

_GRACE = 10.0  # seconds that process 0 may be late with its word
_MAX_LINE = 4096  # bytes; who sends more is not one of us
_MAX_NAMES = 64  # in a message


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands among those of the run.

    Attributes:
      address: host:port of process 0.
      num_processes: How many there are.
      process_id: Which of them this one is.
      local_device_ids: The only devices that it may use; None for all of its host.
      hosts: The host of each process, as far as the cluster tells; "" where it does not.
    """

    address: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None
    hosts: tuple[str, ...] = ()

    def __post_init__(self):
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise InputError(
                f"The coordinator's address is {self.address!r}; needed: host:port of process 0, "
                f"such as host0:8476."
            )
        if not 0 <= self.process_id < self.num_processes:
            raise InputError(
                f"process_id={self.process_id} is not one of {self.num_processes} process(es): "
                f"they count from 0 to num_processes - 1, and each has its own."
            )

    def name(self, process: int) -> str:
        """A process and, where known, its host."""
        known = process < len(self.hosts) and self.hosts[process]
        return f"{process} ({self.hosts[process]})" if known else str(process)


def call_the_roll(place: Place, timeout: float) -> None:
    """Returns when every process is there; a JoinError on every one of them that waits if not."""
    if place.num_processes == 1:
        return
    began = time.monotonic()
    fault = (_call if place.process_id == 0 else _answer)(place, timeout)
    if fault:
        raise JoinError(fault)
    logging.info(
        "All %d processes are there after %.1f s.", place.num_processes, time.monotonic() - began
    )


# Process 0.


def _call(place: Place, timeout: float) -> str | None:
    """Waits for all others and tells them how it went; what is wrong, or None."""
    deadline = time.monotonic() + timeout
    with _listen(place) as server, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        joined: dict[int, tuple[str, socket.socket]] = {}
        heard: dict[socket.socket, bytes] = {}
        fault = None
        while len(joined) < place.num_processes - 1 and fault is None:
            ready = selector.select(min(30.0, max(deadline - time.monotonic(), 0)))
            if not ready and time.monotonic() >= deadline:
                fault = _missing(place, joined, timeout)
            elif not ready:
                logging.info("Waiting. %s", _missing(place, joined, None))
            for key, _ in ready:
                if key.fileobj is server:
                    connection, _ = server.accept()
                    heard[connection] = b""
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                connection = key.fileobj
                part = _receive(connection)
                heard[connection] += part
                if not part or len(heard[connection]) > _MAX_LINE:
                    # Ended, perhaps to be started again; or a stranger at the port.
                    selector.unregister(connection)
                    connection.close()
                    del heard[connection]
                    joined = {n: (h, c) for n, (h, c) in joined.items() if c is not connection}
                elif heard[connection].endswith(b"\n"):
                    fault = fault or _admit(place, joined, heard[connection], connection)
        word = json.dumps({"fault": fault}).encode() + b"\n"
        for connection in heard:
            _send(connection, word)
            connection.close()
    return fault


def _listen(place: Place) -> socket.socket:
    """Where JAX's coordinator will listen: at every address of this host, or as told."""
    port = int(place.address.rpartition(":")[2])
    asked = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    host, _, bind_port = asked.rpartition(":") if asked else ("", "", "")
    host = host.strip("[]")
    try:
        if host and host != "::":
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server(
                (host, int(bind_port)), family=family, backlog=place.num_processes
            )
        both = socket.has_dualstack_ipv6()
        return socket.create_server(
            ("", port),
            family=socket.AF_INET6 if both else socket.AF_INET,
            dualstack_ipv6=both,
            backlog=place.num_processes,
        )
    except OSError as error:
        raise JoinError(
            f"Process 0 cannot listen at {asked or place.address}: {error}. Another program, or a "
            f"second process 0, may hold the port; choose another one."
        ) from error


def _admit(place: Place, joined: dict, line: bytes, connection: socket.socket) -> str | None:
    """Takes one that says who it is; what is wrong with it, or None."""
    try:
        hello = json.loads(line)
        process, count, host = hello["process"], hello["num_processes"], hello["host"]
        known = process in range(count)
    except (ValueError, TypeError, KeyError):
        known = False
    if not known:
        logging.warning("Somebody else called at %s and is ignored: %.80r", place.address, line)
        return None
    if count != place.num_processes:
        return (
            f"Process {process} on {host} was started as one of {count}, process 0 on "
            f"{socket.gethostname()} as one of {place.num_processes}. Give all the same "
            f"number of processes."
        )
    if process == 0 or process in joined:
        other = joined[process][0] if process else socket.gethostname()
        return (
            f"Two processes say that they are process {process} of {count}, on {other} and on "
            f"{host}. Give each its own process_id."
        )
    joined[process] = host, connection
    return None


def _missing(place: Place, joined: dict, timeout: float | None) -> str:
    """Who is missing; still, or after `timeout` seconds."""
    there = {0: socket.gethostname()} | {process: host for process, (host, _) in joined.items()}
    absent = [place.name(n) for n in range(place.num_processes) if n not in there]
    present = [f"{process} ({host})" for process, host in sorted(there.items())]
    what = "are missing" if timeout is None else f"did not join within {timeout:g} s"
    text = f"{len(absent)} of {place.num_processes} processes {what}: "
    text += f"{listed(absent, _MAX_NAMES)}; joined: {listed(present, _MAX_NAMES)}."
    if timeout is None:
        return text
    return text + (
        f" See what the missing ones say, whether they were started and reach {place.address}, and "
        f"start all again; --join_timeout waits longer."
    )


# The others.


def _answer(place: Place, timeout: float) -> str | None:
    """Calls process 0 and waits for its word; what is wrong, or None."""
    host, _, port = place.address.rpartition(":")
    hello = {"process": place.process_id, "num_processes": place.num_processes}
    hello = json.dumps(hello | {"host": socket.gethostname()}).encode() + b"\n"
    deadline, reason = time.monotonic() + timeout, "nobody listened"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(
                (host.strip("[]"), int(port)), timeout=left
            ) as connection:
                connection.sendall(hello)
                # It decides when waiting ends, by its own clock.
                connection.settimeout(timeout + _GRACE)
                return json.loads(_read_line(connection))["fault"]
        except OSError as error:
            reason = str(error)
        except (ValueError, TypeError, KeyError):
            reason = "it gave no word: it has ended, or the run has begun without this process"
        # Process 0 may be late, or be started again.
        time.sleep(min(0.5, max(deadline - time.monotonic(), 0)))
    return (
        f"Process {place.process_id} of {place.num_processes} ({socket.gethostname()}) did not "
        f"reach process 0 at {place.address} within {timeout:g} s: {reason}. See whether process 0 "
        f"runs there, whether the name resolves to its host, and whether the port is open between "
        f"the hosts."
    )


def _read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n") and (part := connection.recv(_MAX_LINE)):
        line += part
    return line


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(_MAX_LINE)
    except OSError:
        return b""


def _send(connection: socket.socket, word: bytes) -> None:
    try:
        connection.sendall(word)
    except OSError as error:
        logging.warning("A process that had joined is gone: %s", error)
