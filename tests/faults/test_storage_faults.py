"""Storage that is full, slow or damaged, and clocks that jump."""

import os
import shutil
import time

import pytest

from lumina_jax.errors import RESTART
from tests.faults.cluster import ABORTED
from tests.faults.test_stops import assert_equals_undisturbed

DAY = 24 * 3600


@pytest.mark.slow
@pytest.mark.parametrize("whose", [None, 0, 1])
def test_a_full_disk_during_a_save_ends_the_run_and_loses_nothing(faulty, undisturbed, whose):
    """Of all processes, or of one alone, which the others must learn."""
    cluster, steer = faulty
    if whose is not None:
        cluster.environment["FAULT_PROCESS"] = str(whose)
    steer["slow"].write_text("2000")  # so that saves take long enough to be met
    cluster.start().trains()
    cluster.until(lambda: cluster.steps() and cluster.is_saving(), 120, "second save")
    whole = cluster.steps()
    steer["full"].touch()
    statuses = cluster.wait(150)
    assert set(statuses) == {RESTART}, cluster.log()
    assert "No space left on device" in cluster.log(0) + cluster.log(1)
    assert "The checkpoint of step" in cluster.log(0) + cluster.log(1)
    assert cluster.steps()[-1] >= whole[-1]
    steer["full"].unlink()
    steer["slow"].unlink()
    step = cluster.steps()[-1] // 20 * 20 + 20
    cluster.start(f"--config.train.num_steps={step}").finish()
    assert_equals_undisturbed(cluster, undisturbed, step)


@pytest.mark.slow
def test_slow_storage_only_takes_longer(faulty, undisturbed, dataset):
    """Twenty milliseconds for every access to data, checkpoints and logs."""
    cluster, steer = faulty
    cluster.environment["FAULT_PATH"] = os.path.commonpath([dataset, cluster.workdir])
    steer["slow"].write_text("20000")
    cluster.start("--config.train.num_steps=20").finish(600)
    assert_equals_undisturbed(cluster, undisturbed, 20)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_clocks_that_jump_lose_nothing(faulty, undisturbed, num_processes):
    """A day forwards, two days back, while it runs and between two starts.

    JAX's coordinator may take that for silence and abort several processes; one goes on.
    """
    cluster, steer = faulty
    cluster.num_processes = num_processes
    cluster.start("--config.train.num_steps=20").trains()
    for skew in (DAY, -DAY):
        steer["clock"].write_text(str(skew))
        time.sleep(1.5)
    allowed = {0} if num_processes == 1 else {0, RESTART, ABORTED}
    assert set(cluster.wait()) <= allowed, cluster.log()
    steer["clock"].write_text(str(-7 * DAY))
    cluster.start("--config.train.num_steps=40").finish()
    if num_processes == 2:
        assert_equals_undisturbed(cluster, undisturbed, 40)
    for step, (loss, _) in cluster.losses().items():
        assert loss == pytest.approx(undisturbed.losses()[step][0], rel=2e-4)
    shares = {
        name: value
        for name, value in cluster.lines()[-1].items()
        if name == "goodput" or name.startswith("lost/")
    }
    assert all(0 <= value <= 1 for value in shares.values()), shares
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_a_damaged_checkpoint_stops_all_processes_or_is_passed_over(cluster, undisturbed):
    cluster.start("--config.train.num_steps=20").finish()
    state = cluster.workdir / "checkpoints" / "20" / "state"
    largest = max(state.glob("ocdbt.process_1/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert cluster.start("--config.train.num_steps=40").wait() == [2, 2]
    assert f"The checkpoint {state.parent} is damaged" in cluster.log(0) + cluster.log(1)
    assert cluster.steps() == [15, 20]

    flags = ("--config.train.num_steps=40", "--config.train.if_damaged=previous")
    cluster.start(*flags).finish()
    assert (cluster.workdir / "damaged" / "20" / "state").is_dir()
    assert_equals_undisturbed(cluster, undisturbed, 40)


@pytest.mark.slow
def test_a_damaged_record_is_replaced_by_the_same_one_everywhere(cluster, dataset, tmp_path):
    """A flipped byte in a shard: the run does not stop, and it does not matter who reads it."""
    damaged = tmp_path / "damaged_data"
    shutil.copytree(dataset, damaged)
    shard = max(damaged.glob("*.array_record-*"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    used = [at for at, byte in enumerate(content) if byte]  # much of a small shard is padding
    content[used[len(used) // 2]] ^= 0xFF
    shard.write_bytes(content)
    cluster.dataset = damaged
    cluster.start("--config.train.num_steps=12").finish()
    assert cluster.lines()[-1]["records_replaced"] > 0
    two = cluster.losses()
    cluster.num_processes, cluster.workdir = 1, tmp_path / "alone"
    cluster.start("--config.train.num_steps=12").finish()
    assert cluster.losses().keys() == two.keys()
    for step, (loss, _) in cluster.losses().items():
        assert loss == pytest.approx(two[step][0], rel=2e-4)


@pytest.mark.slow
def test_a_missing_shard_is_refused_before_the_first_step(cluster, dataset, tmp_path):
    lacking = tmp_path / "lacking"
    shutil.copytree(dataset, lacking)
    shard = sorted(lacking.glob("*.array_record-*"))[0]
    shard.unlink()
    cluster.dataset = lacking
    assert cluster.start().wait() == [2, 2]
    assert f"lacks {shard.name}" in cluster.log()
