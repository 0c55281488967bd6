"""The account of a run's time: every second is of one class, over all starts."""

import json
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from lumina_jax import goodput
from lumina_jax.errors import InputError
from lumina_jax.goodput import Account


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it on; it began in 1970."""
    now = [1000.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: now[0] - 77)
    monkeypatch.setattr(goodput.time, "time", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def seconds(path):
    return {name: value for name, value in goodput.totals(goodput.read(path)).items() if value}


def test_every_second_is_of_one_class(clock, tmp_path):
    path = tmp_path / goodput.FILE
    with Account(path, began=990.0) as account:
        with account.spending("restore"):
            clock(3)
        clock(2)
        account.begin_step(1)
        clock(4)
        account.move(1.5, "data")
        with account.spending("save"):
            clock(5)
        account.begin_step(2)
        clock(6)
        with account.spending("preview"):
            clock(7)
        account.write(2)
        clock(8)
    found = seconds(path)
    assert found == {
        "start": 12, "restore": 3, "step": 2.5 + 6 + 8, "data": 1.5, "save": 5, "preview": 7,
    }  # fmt: skip
    assert sum(found.values()) == 10 + 35  # ten before the account, the rest by the clock


def test_the_next_start_goes_on_after_a_kill_and_knows_what_it_repeats(clock, tmp_path):
    path = tmp_path / goodput.FILE
    killed = Account(path)
    killed.begin_step(1)
    clock(10)
    killed.write(5)
    clock(4)  # what it did now, nobody will know
    clock(20)
    with Account(path) as account:
        for step in (4, 5, 6):  # the checkpoint was of step 3
            account.begin_step(step)
            clock(1)
            account.write(step)
        scalars = account.scalars()
    assert seconds(path) == {"step": 11, "repeated": 2, "down": 24}
    assert scalars["goodput"] == pytest.approx(11 / 37)
    assert scalars["lost/down"] == pytest.approx(24 / 37)
    assert sum(scalars.values()) == pytest.approx(1)
    assert account.table().splitlines()[0] == "2 start(s), 37.0 s, of which steps are 29.7%"
    assert account.table().splitlines()[1].split() == ["down", "24.0", "s", "64.9%"]


def test_starts_do_not_overlap_where_clocks_differ(clock, tmp_path):
    path = tmp_path / goodput.FILE
    with Account(path) as account:
        account.begin_step(1)
        clock(10)
        account.write(1)
    with Account(path, began=900.0) as account:  # before the first start ended
        account.begin_step(2)
        clock(1)
        account.write(2)
    assert seconds(path) == {"step": 11}


def test_a_clock_that_jumps_leaves_no_class_less_than_nothing(clock, monkeypatch, tmp_path):
    path = tmp_path / goodput.FILE
    with Account(path) as account:
        account.begin_step(1)
        clock(10)
        for end in (-86400.0, 86400.0):  # while a program is compiled
            account._on_span("/jax/core/compile/x", 0.0, end)
        account.write(1)
    monkeypatch.setattr(goodput.time, "time", lambda: -7 * 86400.0)
    with Account(path) as account:
        account.begin_step(2)
        clock(1)
        account.write(2)
        shares = account.scalars()
    assert seconds(path) == {"compile": 10, "step": 1}
    assert all(0 <= share <= 1 for share in shares.values())
    assert sum(shares.values()) == pytest.approx(1)


def test_a_start_that_reaches_no_step_leaves_no_account(tmp_path):
    with Account(tmp_path / goodput.FILE):
        pass
    assert not (tmp_path / goodput.FILE).exists()


def test_compiling_is_told_apart_wherever_it_happens(tmp_path):
    """Real programs: as long as JAX says it took; one that is compiled in a trace counts once."""
    spans = []

    def with_a_program_inside(x):
        with jax.ensure_compile_time_eval():
            return x + jax.jit(lambda y: jnp.sin(y) * time.time())(jnp.ones(7))

    account = Account(tmp_path / goodput.FILE)

    def note(event, start, end, **_):
        if event.startswith("/jax/core/compile/"):
            spans.append((start, end))

    jax.monitoring.register_event_time_span_listener(note)
    try:
        with account:
            account.begin_step(1)
            with account.spending("preview"):
                jax.jit(with_a_program_inside)(jnp.ones(7)).block_until_ready()
            account.write(1)
    finally:
        jax.monitoring.unregister_event_time_span_listener(note)
    found = seconds(tmp_path / goodput.FILE)
    covered, until = 0.0, 0.0
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    assert sum(end - start for start, end in spans) > covered  # some did nest
    assert found["compile"] == pytest.approx(covered, abs=1e-6)
    assert found["preview"] > 0


def test_compiling_in_another_thread_holds_nothing_up(tmp_path):
    with Account(tmp_path / goodput.FILE) as account:
        account.begin_step(1)
        thread = threading.Thread(target=lambda: jax.jit(lambda x: x + time.time())(jnp.ones(3)))
        thread.start()
        thread.join()
        account.write(1)
    assert "compile" not in seconds(tmp_path / goodput.FILE)


def test_the_file_may_be_removed_but_not_broken(tmp_path):
    path = tmp_path / goodput.FILE
    path.write_text(json.dumps({"begins": []}))
    with pytest.raises(InputError, match=r"is not the account of a run's time .*Remove it"):
        Account(path)


def test_a_process_knows_when_it_began_before_its_imports():
    before = time.time()
    printed = subprocess.run(
        [sys.executable, "-c", "from lumina_jax import goodput; print(goodput.process_start())"],
        capture_output=True,
        check=True,
    ).stdout
    # The system counts hundredths.
    assert before - 0.02 <= float(printed) < before + 0.5 < time.time()
