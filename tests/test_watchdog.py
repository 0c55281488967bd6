"""A run that hangs is ended, and its stacks are kept."""

import threading
import time

from lumina_jax.errors import RESTART
from lumina_jax.watchdog import Watchdog


def nap_somewhere_deep(seconds):
    time.sleep(seconds)


def test_a_run_that_does_not_come_further_is_ended_with_its_stacks(tmp_path, caplog):
    ended, over = [], threading.Event()
    with Watchdog(tmp_path, 1.0, end=lambda status: (ended.append(status), over.set())) as watchdog:
        watchdog.advance(7, "waiting for data")
        nap_somewhere_deep(3)
    assert over.wait(1)
    assert ended == [RESTART]
    (report,) = (tmp_path / "hangs").iterdir()
    assert report.name == "step_0000007_process_000.txt"
    text = report.read_text()
    assert "has not come further than 'waiting for data' of step 7 for" in text
    assert "in nap_somewhere_deep" in text
    assert "in nap_somewhere_deep" in caplog.text


def test_a_run_that_comes_further_is_left_alone(tmp_path):
    ended = []
    with Watchdog(tmp_path, 1.0, end=ended.append) as watchdog:
        for step in range(8):
            watchdog.advance(step, "training")
            time.sleep(0.3)
    time.sleep(1.5)  # it has ended with its context
    assert not ended
    assert not list(tmp_path.iterdir())


def test_without_a_timeout_nothing_is_watched(tmp_path):
    before = threading.active_count()
    with Watchdog(tmp_path, 0.0):
        assert threading.active_count() == before
