"""What processes know of each other, over a store that they share as that of the coordinator."""

import collections
import threading
import time

import pytest

from lumina_jax.errors import RESTART
from lumina_jax.peers import Peers

PATIENCE = 0.6


class Store:
    """As jax's coordinator behaves: a key is written once, unless it may be overwritten."""

    def __init__(self):
        self.values = {}
        self.barriers = collections.defaultdict(lambda: threading.Barrier(2))

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        if key in self.values and not allow_overwrite:
            raise RuntimeError(f"ALREADY_EXISTS: {key}")
        self.values[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return [(k, v) for k, v in self.values.items() if k.startswith(key)]

    def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int) -> None:
        self.barriers[barrier_id].wait(timeout_in_ms / 1000)


@pytest.fixture
def start():
    """Starts processes by number; those that have ended say so in `ended`."""
    store, ended, running = Store(), {}, []

    def start(*numbers, of):
        for number in numbers:
            peers = Peers(
                store, number, of, name="host{}".format, lost_timeout=PATIENCE,
                end=lambda status, number=number: ended.setdefault(number, status),
            )  # fmt: skip
            running.append(peers)
        return running

    yield start, ended
    for peers in running:
        peers.close()


def test_all_that_live_are_left_alone_and_known(start):
    start, ended = start
    first, second = start(0, 1, of=2)
    second.advance(5, "saving")
    time.sleep(3 * PATIENCE)
    assert not ended
    assert {n: (p.step, p.doing) for n, p in first.places().items()} == {
        0: (0, "start"),
        1: (5, "saving"),
    }


def test_two_meet_each_time_anew(start):
    start, _ = start
    first, second = start(0, 1, of=2)
    for _ in range(2):
        early = threading.Thread(target=first.meet, args=("here",))
        early.start()
        early.join(PATIENCE / 2)
        assert early.is_alive()
        second.meet("here")
        early.join(PATIENCE)
        assert not early.is_alive()


def test_one_that_falls_silent_ends_all_with_its_name(start, caplog):
    start, ended = start
    *_, last = start(0, 1, 2, of=3)
    time.sleep(PATIENCE / 2)
    last._stop.set()  # it is gone, and says nothing more
    time.sleep(3 * PATIENCE)
    assert ended == {0: RESTART, 1: RESTART}
    assert "Process host2 of 3 gave no sign of life" in caplog.text


def test_one_that_never_came_is_lost_too(start):
    start, ended = start
    start(0, of=2)
    time.sleep(3 * PATIENCE)
    assert ended == {0: RESTART}


def test_one_that_is_done_is_not_lost(start):
    start, ended = start
    _, second = start(0, 1, of=2)
    second.close()
    time.sleep(3 * PATIENCE)
    assert not ended


def test_the_first_verdict_is_that_of_all(start, caplog):
    start, ended = start
    _, second, third = start(0, 1, 2, of=3)
    second.end_all(2, "Its data are missing.")
    third.end_all(1, "Something followed from it.")
    time.sleep(2 * PATIENCE)
    assert ended == {0: 2, 1: 2, 2: 2}
    assert "Its data are missing. This process ends too, with status 2." in caplog.text
