"""Processes that end, are ended, hang or never come: the run goes on as if nothing had happened."""

import random
import signal
import time

import pytest

from lumina_jax.errors import RESTART
from tests.faults.cluster import ABORTED

NUM_KILLS = 20


def assert_equals_undisturbed(cluster, undisturbed, step):
    """Parameters, average, moments, counts and data to the last bit, and every loss before."""
    assert cluster.digest(step) == undisturbed.digest(step)
    expected = {s: numbers for s, numbers in undisturbed.losses().items() if s <= step}
    assert {s: numbers for s, numbers in cluster.losses().items() if s <= step} == expected


@pytest.mark.slow
def test_a_termination_of_one_saves_all_at_the_same_step_and_asks_for_a_restart(cluster):
    cluster.start("--config.train.checkpoint_every=100000").trains()
    began = time.monotonic()
    cluster.signal(1, signal.SIGTERM)
    assert cluster.wait(60) == [RESTART, RESTART]
    seconds = time.monotonic() - began
    (step,) = cluster.steps()
    for number in range(2):
        assert f"Stopped at step {step}, which is saved" in cluster.log(number)
    assert seconds < 60  # the first save compiles


@pytest.mark.slow
def test_a_terminated_run_goes_on_bit_for_bit(cluster, undisturbed):
    for number in (0, 1):
        cluster.start().trains()
        cluster.signal(number, signal.SIGTERM)
        assert cluster.wait(60) == [RESTART, RESTART]
    (*_, stopped) = cluster.steps()
    step = -(-stopped // 20) * 20 + 20
    cluster.start(f"--config.train.num_steps={step}").finish()
    assert_equals_undisturbed(cluster, undisturbed, step)


@pytest.mark.slow
@pytest.mark.parametrize("victims", ["all", "one"])
def test_kills_at_random_moments_lose_nothing(cluster, undisturbed, victims):
    """Half of them while a checkpoint is being written; `one` leaves the other to notice."""
    choose = random.Random(victims)
    num_kills = NUM_KILLS - 4 if victims == "all" else 4
    inside, afterwards = 0, []
    for kill in range(num_kills):
        cluster.start().trains().trains_for(choose.randrange(10))
        if kill % 2:
            cluster.until(cluster.is_saving, 60, "save")
        time.sleep(choose.uniform(0, 0.1 if kill % 2 else 1))
        inside += cluster.is_saving()
        if victims == "all":
            cluster.kill()
        else:
            victim = choose.randrange(2)
            cluster.signal(victim, signal.SIGKILL)
            statuses = cluster.wait(60)
            assert statuses[victim] == -signal.SIGKILL
            afterwards.append(statuses[1 - victim])
    print(f"{num_kills} kills, {inside} inside a save, newest step {max(cluster.steps())}")
    assert inside >= num_kills // 4
    assert set(afterwards) <= {RESTART, ABORTED}
    step = -(-max(cluster.steps()) // 20) * 20 + 20
    cluster.start(f"--config.train.num_steps={step}").finish()
    assert_equals_undisturbed(cluster, undisturbed, step)


@pytest.mark.slow
def test_a_frozen_process_is_taken_for_lost_and_named(cluster):
    cluster.start().trains()
    cluster.signal(1, signal.SIGSTOP)
    cluster.until(lambda: cluster.processes[0].poll() is not None, 90, "end of process 0")
    assert cluster.processes[0].returncode == RESTART
    assert "Process 1 of 2 gave no sign of life for 20 s" in cluster.log(0)


@pytest.mark.slow
def test_a_process_that_hangs_is_found_and_its_stack_written(cluster):
    cluster.module = "tests.faults.hanging_train"
    cluster.environment = {"HANGING_PROCESS": "1"}
    cluster.start("--config.train.hang_timeout=45")  # longer than it compiles without a cache
    assert cluster.wait(300) == [RESTART, RESTART]
    for number in range(2):
        assert "The processes that came least far: 1 ('waiting for data' of step" in (
            cluster.log(number)
        )
    stacks = [path.read_text() for path in (cluster.workdir / "hangs").iterdir()]
    assert any("hanging_train.py" in text and "waiting for data" in text for text in stacks)


@pytest.mark.slow
def test_a_process_that_fails_alone_ends_all_with_its_status(cluster, dataset, tmp_path):
    """The data are missing on one host only."""
    cluster.module = "tests.faults.hanging_train"
    cluster.environment = {"FAILING_PROCESS": "1"}
    assert cluster.start().wait(90) == [2, 2]
    assert "Process 1" in cluster.log(0)
    assert "has failed: /nowhere is not a finished dataset" in cluster.log(0)


@pytest.mark.slow
def test_a_process_that_never_joins_is_named(cluster):
    cluster.start("--join_timeout=5", only=[0])
    assert cluster.wait(60) == [RESTART]
    assert "1 of 2 processes did not join within 5 s: 1; joined: 0" in cluster.log()


@pytest.mark.slow
def test_a_second_run_in_the_same_workdir_is_refused_and_the_first_goes_on(cluster):
    cluster.start().trains()
    first = cluster.processes
    cluster.start()
    assert cluster.wait(90) == [2, 2]
    assert "is in use: process" in cluster.log()
    assert all(process.poll() is None for process in first)
    step = max(cluster.losses())
    time.sleep(3)
    assert max(cluster.losses()) > step
    for process in first:
        process.kill()
        process.wait()
    cluster.start().trains()  # the lock of the dead one holds nobody up


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_and_meshes(cluster, undisturbed):
    meshes = [(2, (2, 2, 2)), (1, (1, 4, 2)), (4, (1, 8, 1)), (2, (1, 8, 1))]
    for part, (num_processes, mesh) in enumerate(meshes):
        cluster.num_processes = num_processes
        names = ("replica", "data", "model")
        flags = [f"--config.mesh.{name}={n}" for name, n in zip(names, mesh, strict=True)]
        cluster.start(*flags, f"--config.train.num_steps={10 * part + 10}").finish()
    expected, found = undisturbed.losses(), cluster.losses()
    assert sorted(found) == list(range(1, 41))
    for step, (loss, rate) in found.items():
        assert loss == pytest.approx(expected[step][0], rel=2e-4)
        assert rate == expected[step][1]


@pytest.mark.slow
def test_changed_settings_are_listed_and_the_harmful_refused(cluster):
    cluster.start("--config.train.num_steps=5").finish()
    cluster.start(
        "--config.train.num_steps=6",
        "--config.optim.learning_rate=5e-4",
        "--config.data.prefetch=2",
    ).finish()
    learned, rest = cluster.log().split("which learning does not depend on")
    assert "optim.learning_rate: 0.001 there, 0.0005 here" in learned
    assert "train.num_steps: 5 there, 6 here" in learned
    assert "data.prefetch: 4 there, 2 here" in rest
    assert cluster.start("--config.train.batch_size=16", "--config.seed=1").wait() == [2, 2]
    assert "another data: batch_size: 8 there, 16 in this run; seed: 0 there, 1" in cluster.log()
