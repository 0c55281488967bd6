"""One run in a workdir: a lock that a crash does not leave behind for ever."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from lumina_jax import lease
from lumina_jax.errors import InputError, RestartError
from lumina_jax.lease import Lease

QUICK = dict(renew=0.1, patience=1.0, settle=0.2)


def held_by(workdir, **changes):
    """Leaves the lock of somebody in a workdir."""
    holder = dataclasses.replace(lease.Holder.myself(), **changes)
    (workdir / lease.FILE).write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def test_a_workdir_is_held_once_and_free_afterwards(tmp_path):
    with Lease(tmp_path / "run", **QUICK):
        with pytest.raises(InputError, match=f"is in use: process {os.getpid()} on .* by run.lock"):
            Lease(tmp_path / "run", **QUICK).__enter__()
        with Lease(tmp_path / "other", **QUICK):
            pass
    assert not list((tmp_path / "run").iterdir())
    with Lease(tmp_path / "run", **QUICK):
        pass


def test_the_lock_of_a_dead_process_of_this_machine_holds_nobody_up(tmp_path):
    code = (
        "import os, sys; from lumina_jax.lease import Lease; Lease(sys.argv[1]).__enter__();"
        "os._exit(9)"
    )
    dead = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert dead.returncode == 9
    assert (tmp_path / lease.FILE).exists()
    began = time.monotonic()
    with Lease(tmp_path, **{**QUICK, "patience": 1000.0}) as taken:
        assert time.monotonic() - began < 5
        taken.check()


def test_a_process_number_that_is_used_again_is_not_the_holder(tmp_path):
    held_by(tmp_path, birth=1)
    with Lease(tmp_path, **{**QUICK, "patience": 1000.0}):
        pass


def test_the_lock_of_another_machine_is_watched(tmp_path):
    """It counts as dead when it has not changed for long enough, whatever any clock says."""
    held_by(tmp_path, machine="elsewhere")
    began = time.monotonic()
    with Lease(tmp_path, **QUICK):
        assert time.monotonic() - began >= QUICK["patience"]


def test_the_living_holder_on_another_machine_is_left_alone(tmp_path):
    stop = threading.Event()

    def renew():
        count = 0
        while not stop.wait(0.1):
            held_by(tmp_path, machine="elsewhere", token="theirs", count=(count := count + 1))

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        time.sleep(0.3)
        with pytest.raises(InputError, match="is in use"):
            Lease(tmp_path, **QUICK).__enter__()
    finally:
        stop.set()
        thread.join()


def test_who_was_taken_for_dead_notices_and_leaves_the_lock_to_the_other(tmp_path):
    with Lease(tmp_path, **QUICK) as first:
        first.check()
        other = held_by(tmp_path, token="theirs", pid=7, host="host7")
        time.sleep(0.5)
        with pytest.raises(RestartError, match="now names process 7 on host7"):
            first.check()
    assert json.loads((tmp_path / lease.FILE).read_text())["token"] == other.token


def test_of_two_that_take_a_dead_ones_place_at_once_one_gets_it(tmp_path):
    held_by(tmp_path, birth=1)
    gate, results = threading.Barrier(4), []

    def take():
        gate.wait()
        try:
            with Lease(tmp_path, **QUICK):
                results.append("held")
                time.sleep(1.0)
        except InputError:
            results.append("refused")

    threads = [threading.Thread(target=take) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(results) == ["held", "refused", "refused", "refused"]


def test_what_is_no_lock_is_written_anew(tmp_path):
    (tmp_path / lease.FILE).write_text("{")
    with Lease(tmp_path, **QUICK):
        assert json.loads((tmp_path / lease.FILE).read_text())["pid"] == os.getpid()
